// Instructions of PTX, and what those compute that neither touch memory nor wait for other threads. See ptx_machine.h.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>

#include "ptx_machine.h"

namespace ptx {

// Names that Python looks up: `PtxNames`.
#define OPS(X)                                                                                                      \
  X(mov) X(pack) X(unpack) X(ld) X(st) X(cvt) X(add) X(sub) X(mul_lo) X(mul_hi) X(mul_wide) X(mad_lo) X(mad_wide)    \
  X(mad_hi) X(fma) X(div) X(rem) X(min) X(max) X(neg) X(abs) X(not_) X(and_) X(or_) X(xor_) X(shl) X(shr) X(shf_l)   \
  X(shf_r) X(bfi) X(bfe) X(popc) X(clz) X(brev) X(bfind) X(prmt) X(lop3) X(setp) X(set) X(selp) X(slct) X(bra)       \
  X(brx) X(ret) X(trap) X(nop) X(to_shared) X(from_shared) X(atom) X(red) X(cp_async) X(commit) X(wait_group)        \
  X(wait_all) X(bar) X(warp_sync) X(shfl) X(vote) X(match_any) X(redux) X(ldmatrix) X(mma) X(activemask)
enum Op {
#define X(name) k_##name,
  OPS(X)
#undef X
};

enum Kind { kBits, kUnsigned, kSigned, kFloat, kBfloat, kHalf, kPredicate, kBfloatPair };
enum Compare { kEq, kNe, kLt, kLe, kGt, kGe, kAnd, kOr, kXor };
enum Atomic { kAdd, kMin, kMax, kExch, kCas, kAtomAnd, kAtomOr, kInc };
enum ShuffleMode { kUp, kDown, kButterfly, kIndex };
enum Vote { kAll, kAny, kBallot };

// The first slots.
enum Special { kTidX, kTidY, kTidZ, kNtidX, kNtidY, kNtidZ, kCtaX, kCtaY, kCtaZ, kNctaX, kNctaY, kNctaZ, kLane, kWarp };

inline int Bits(int32_t type) { return type & 255; }
inline int KindOf(int32_t type) { return type >> 8; }
inline uint64_t Truncate(uint64_t v, int bits) { return bits >= 64 ? v : v & ((uint64_t{1} << bits) - 1); }
inline int64_t Extend(uint64_t v, int bits) { return bits >= 64 ? int64_t(v) : int64_t(v << (64 - bits)) >> (64 - bits); }

inline float F(uint64_t bits) {
  const uint32_t low = uint32_t(bits);
  float f;
  std::memcpy(&f, &low, 4);
  return f;
}
inline uint64_t FromF(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  return bits;
}
inline double D(uint64_t bits) {
  double d;
  std::memcpy(&d, &bits, 8);
  return d;
}
inline uint64_t FromD(double d) {
  uint64_t bits;
  std::memcpy(&bits, &d, 8);
  return bits;
}
inline float FromBfloat(uint64_t bits) { return F((bits & 0xffff) << 16); }
inline uint64_t ToBfloat(float f) {  // to nearest even
  const uint64_t bits = FromF(f);
  if (std::isnan(f)) return 0x7fff;
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16 & 0xffff;
}

// std::domain_error where there is no result.
// As a wide integer, by its type.
inline __int128 Wide(uint64_t v, int32_t type) {
  return KindOf(type) == kSigned ? __int128(Extend(v, Bits(type))) : __int128(Truncate(v, Bits(type)));
}
inline float Single(uint64_t v, int32_t type) { return KindOf(type) == kBfloat ? FromBfloat(v) : F(v); }

inline bool Holds(int mode, int32_t type, uint64_t a, uint64_t b, bool* ordered) {
  *ordered = true;
  auto compare = [mode](auto x, auto y) {
    switch (mode) {
      case kEq: return x == y;
      case kNe: return x != y;
      case kLt: return x < y;
      case kLe: return x <= y;
      case kGt: return x > y;
      default: return x >= y;
    }
  };
  if (KindOf(type) == kFloat || KindOf(type) == kBfloat) {
    const double x = Bits(type) == 64 ? D(a) : Single(a, type), y = Bits(type) == 64 ? D(b) : Single(b, type);
    *ordered = !std::isnan(x) && !std::isnan(y);
    return *ordered && compare(x, y);
  }
  return compare(Wide(a, type), Wide(b, type));
}

inline uint64_t Arithmetic(const Instruction& i, uint64_t a, uint64_t b, uint64_t c) {
  const int kind = KindOf(i.type), bits = Bits(i.type);
  if (kind == kFloat || kind == kBfloat) {
    auto compute = [&](auto x, auto y, auto z) -> decltype(x) {
      switch (i.op) {
        case k_add: return x + y;
        case k_sub: return x - y;
        case k_mul_lo: return x * y;
        case k_fma: return std::fma(x, y, z);
        case k_div: return x / y;
        case k_min: return std::fmin(x, y);
        case k_max: return std::fmax(x, y);
        case k_neg: return -x;
        case k_abs: return std::fabs(x);
        default: throw std::domain_error("an operation that floating point does not have");
      }
    };
    if (bits == 64) return FromD(compute(D(a), D(b), D(c)));
    const float result = compute(Single(a, i.type), Single(b, i.type), Single(c, i.type));
    return kind == kBfloat ? ToBfloat(result) : FromF(result);
  }
  if (kind == kBfloatPair) {
    Instruction half = i;
    half.type = kBfloat << 8 | 16;
    return Arithmetic(half, a, b, c) | Arithmetic(half, a >> 16, b >> 16, c >> 16) << 16;
  }
  const __int128 x = Wide(a, i.type), y = Wide(b, i.type);
  const bool wide = i.op == k_mad_wide || i.op == k_mul_wide;
  const __int128 z = wide ? Wide(c, (kind << 8) | 2 * bits) : Wide(c, i.type);
  const uint64_t shift = uint32_t(b);
  switch (i.op) {
    case k_add: return uint64_t(x + y);
    case k_sub: return uint64_t(x - y);
    case k_mul_lo: case k_mul_wide: return uint64_t(x * y);
    case k_mad_lo: case k_mad_wide: case k_fma: return uint64_t(x * y + z);
    case k_mul_hi: return uint64_t((x * y) >> bits);
    case k_mad_hi: return uint64_t(((x * y) >> bits) + z);
    case k_div: case k_rem:
      if (y == 0) throw std::domain_error("divides by zero");
      return uint64_t(i.op == k_div ? x / y : x % y);
    case k_min: return uint64_t(std::min(x, y));
    case k_max: return uint64_t(std::max(x, y));
    case k_neg: return uint64_t(-x);
    case k_abs: return uint64_t(x < 0 ? -x : x);
    case k_not_: return bits == 1 ? !a : ~a;
    case k_and_: return a & b;
    case k_or_: return a | b;
    case k_xor_: return a ^ b;
    case k_shl: return shift >= uint64_t(bits) ? 0 : a << shift;
    case k_shr: return uint64_t(x >> std::min<uint64_t>(shift, bits));
    default: throw std::domain_error("an operation that integers do not have");
  }
}

inline uint64_t Convert(const Instruction& i, uint64_t a, uint64_t b) {
  const int to = KindOf(i.type), from = KindOf(i.type2);
  if (to == kBfloatPair) return ToBfloat(F(b)) | ToBfloat(F(a)) << 16;
  if (to == kHalf || from == kHalf) throw std::domain_error("float16 is not known here");
  double value;
  if (from == kFloat || from == kBfloat) {
    value = Bits(i.type2) == 64 ? D(a) : Single(a, i.type2);
  } else if (to == kFloat || to == kBfloat) {
    const __int128 x = Wide(a, i.type2);
    if (to == kFloat && Bits(i.type) == 32) return FromF(float(x));
    value = double(x);
  } else {
    return uint64_t(Wide(a, i.type2));  // integers: sign or zero extension
  }
  if (to == kBfloat) return ToBfloat(float(value));
  if (to == kFloat) return Bits(i.type) == 64 ? FromD(value) : FromF(float(value));
  const int bits = Bits(i.type);  // integers saturate
  value = i.mode == 1 ? std::nearbyint(value) : i.mode == 2 ? std::floor(value) : i.mode == 3 ? std::ceil(value) : std::trunc(value);
  if (std::isnan(value)) return 0;
  const double top = std::ldexp(1.0, to == kSigned ? bits - 1 : bits), bottom = to == kSigned ? -top : 0;
  if (value >= top) return Truncate(~uint64_t{0}, to == kSigned ? bits - 1 : bits);
  if (value <= bottom) return to == kSigned ? uint64_t{1} << (bits - 1) : 0;
  return to == kSigned ? uint64_t(int64_t(value)) : uint64_t(value);
}

}  // namespace ptx
