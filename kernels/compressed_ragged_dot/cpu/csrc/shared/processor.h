// What this machine's processor can do.

#ifndef QMOE_PROCESSOR_H_
#define QMOE_PROCESSOR_H_

#include <string_view>

namespace {

// The name of an instruction set if this machine has it, of the best one for "auto"; empty where it lacks it.
inline std::string_view ChooseInstructionSet(std::string_view name) {
#if defined(__x86_64__)
  static const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                               __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("lzcnt");
  static const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") &&
                                 __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vbmi");
  if (has_avx512 && (name == "avx512" || name == "auto")) return "avx512";
  if (has_avx2 && (name == "avx2" || name == "auto")) return "avx2";
#endif
  return name == "portable" || name == "auto" ? "portable" : "";
}

}  // namespace

#endif  // QMOE_PROCESSOR_H_
