"""Messages to token ids, through any Jinja chat template.

Owns the rendering, its loss mask, and the promise that no text from outside becomes a special token. Knows nothing of
models, sampling or HTTP.
"""

from miniphi.chat.builtin import BUILTIN_TEMPLATES, builtin_template
from miniphi.chat.message import ROLES, Message
from miniphi.chat.template import ChatTemplate, RenderedChat

__all__ = ["BUILTIN_TEMPLATES", "ROLES", "ChatTemplate", "Message", "RenderedChat", "builtin_template"]
