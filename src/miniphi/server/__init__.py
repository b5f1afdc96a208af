"""A model behind HTTP, as the clients of OpenAI and Azure expect it.

create_app        the web application                                     app.py
ModelService      the model, its queue and its engine's thread            service.py
Server, bind      bind, serve, drain, end                                 run.py

A request goes schemas.py -> chat.py or completions.py -> service.py -> the engine's thread -> answers.py -> sse.py.
"""

from miniphi.server.app import create_app
from miniphi.server.errors import ApiError
from miniphi.server.run import Server, bind
from miniphi.server.service import ModelService, ServiceLimits

__all__ = ["ApiError", "ModelService", "Server", "ServiceLimits", "bind", "create_app"]
