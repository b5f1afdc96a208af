#include "isa.h"

#include <cstdlib>
#include <stdexcept>

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace miniphi {
namespace {

#if defined(__aarch64__) && defined(MINIPHI_NEON)
// The one optional extension that ops_neon.cpp needs. Every AArch64 Mac has it; a system that cannot be asked has not.
bool has_dot_product() {
#if defined(__APPLE__)
    return true;
#elif defined(__linux__)
    return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
#else
    return false;
#endif
}
#endif

}  // namespace

std::vector<std::string> available_isas() {
    std::vector<std::string> names;
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni"))
        names.emplace_back("avx512");
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
        names.emplace_back("avx2");
#elif defined(__aarch64__) && defined(MINIPHI_NEON)
    if (has_dot_product()) names.emplace_back("neon");
#endif
    names.emplace_back("portable");
    return names;
}

const Ops& select_ops(const std::string& requested) {
    std::string name = requested;
    if (name.empty()) {
        const char* forced = std::getenv("MINIPHI_ISA");
        name = forced && *forced ? forced : available_isas().front();
    }
    std::string known;
    for (const std::string& isa : available_isas()) {
        known += (known.empty() ? "" : ", ") + isa;
        if (isa != name) continue;
#if defined(__x86_64__)
        if (name == "avx512") return ops_avx512();
        if (name == "avx2") return ops_avx2();
#elif defined(__aarch64__) && defined(MINIPHI_NEON)
        if (name == "neon") return ops_neon();
#endif
        return ops_portable();
    }
    throw std::invalid_argument("instruction set '" + name + "' is not available here; this machine and build have: " +
                                known);
}

}  // namespace miniphi
