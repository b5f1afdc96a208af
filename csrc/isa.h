// Which instruction set to run: the best one this processor has, or the one MINIPHI_ISA names.
#pragma once
#include <string>
#include <vector>

#include "ops.h"

namespace miniphi {

// Names of the instruction sets that this build contains and this processor runs, best first.
std::vector<std::string> available_isas();

// The table for a name; "" means MINIPHI_ISA if set, else the best. Throws std::invalid_argument for any other name.
const Ops& select_ops(const std::string& name);

}  // namespace miniphi
