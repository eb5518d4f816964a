// See ptx_machine.h.

#include "ptx_machine.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>

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
enum Space { kGeneric, kGlobal, kShared, kLocal, kParam };
enum Compare { kEq, kNe, kLt, kLe, kGt, kGe, kAnd, kOr, kXor };
enum Atomic { kAdd, kMin, kMax, kExch, kCas, kAtomAnd, kAtomOr, kInc };
enum ShuffleMode { kUp, kDown, kButterfly, kIndex };
enum Vote { kAll, kAny, kBallot };

// The first slots.
enum Special { kTidX, kTidY, kTidZ, kNtidX, kNtidY, kNtidZ, kCtaX, kCtaY, kCtaZ, kNctaX, kNctaY, kNctaZ, kLane, kWarp };

// Where generic addresses mean shared memory. Low, so that offsets stay what they are modulo 2^32.
constexpr uint64_t kSharedWindow = 0xffff000000000000ull;

namespace {

int Bits(int32_t type) { return type & 255; }
int KindOf(int32_t type) { return type >> 8; }
uint64_t Truncate(uint64_t v, int bits) { return bits >= 64 ? v : v & ((uint64_t{1} << bits) - 1); }
int64_t Extend(uint64_t v, int bits) { return bits >= 64 ? int64_t(v) : int64_t(v << (64 - bits)) >> (64 - bits); }

float F(uint64_t bits) {
  const uint32_t low = uint32_t(bits);
  float f;
  std::memcpy(&f, &low, 4);
  return f;
}
uint64_t FromF(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  return bits;
}
double D(uint64_t bits) {
  double d;
  std::memcpy(&d, &bits, 8);
  return d;
}
uint64_t FromD(double d) {
  uint64_t bits;
  std::memcpy(&bits, &d, 8);
  return bits;
}
float FromBfloat(uint64_t bits) { return F((bits & 0xffff) << 16); }
uint64_t ToBfloat(float f) {  // to nearest even
  const uint64_t bits = FromF(f);
  if (std::isnan(f)) return 0x7fff;
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16 & 0xffff;
}

struct Thread {
  std::vector<uint64_t> slots;
  std::vector<uint8_t> local, local_written;
  int pc = 0;
  bool finished = false, waiting = false;
  uint32_t barriers = 0, warp_barriers = 0;  // passed
  struct Copy { uint64_t shared, global; int bytes, zeros; };
  std::vector<std::vector<Copy>> groups;     // committed asynchronous copies, oldest first
  std::vector<Copy> open;
};

// What happened last to a byte of shared memory.
struct Touch {
  int32_t writer = -1, reader = -1;  // threads; -2: several threads of a warp or block
  uint32_t write_barrier = 0, write_warp = 0, read_barrier = 0, read_warp = 0;
  bool several_warps = false;
  bool in_flight = false;
};

class Block {
 public:
  Block(const Program& program, Dim index, Dim grid, Dim size, uint64_t dynamic, const std::vector<uint8_t>& parameters,
        uint64_t launch)
      : p_(program), parameters_(parameters), launch_(launch), state_(TheState()),
        random_(state_.seed + index.x * 7919u) {
    const uint32_t n = size.x * size.y * size.z;
    shared_.assign(program.shared + dynamic, 0xcd);
    touches_.resize(shared_.size());
    threads_.resize(n);
    for (uint32_t t = 0; t < n; ++t) {
      Thread& thread = threads_[t];
      thread.slots = program.slots;
      thread.local.resize(program.local);
      thread.local_written.resize(program.local);
      const uint64_t special[] = {t % size.x, t / size.x % size.y, t / size.x / size.y, size.x, size.y, size.z,
                                  index.x, index.y, index.z, grid.x, grid.y, grid.z, t % 32, t / 32};
      std::copy(std::begin(special), std::end(special), thread.slots.begin());
    }
    index_ = index;
  }

  void Run() {
    const int n = int(threads_.size());
    std::vector<int> order(n);
    for (int i = 0; i < n; ++i) order[i] = state_.order == kBackwards ? n - 1 - i : i;
    for (;;) {
      if (state_.order == kShuffled) std::shuffle(order.begin(), order.end(), random_);
      bool ran = false, running = false;
      for (int t : order) {
        Thread& thread = threads_[t];
        if (thread.finished || thread.waiting) continue;
        ran = true;
        // Shuffled: others get their turn at any instruction.
        const int64_t steps = state_.order == kShuffled ? 1 + random_() % 64 : INT64_MAX;
        for (int64_t i = 0; i < steps && !thread.finished && !thread.waiting; ++i) Step(t);
        running |= !thread.finished && !thread.waiting;
      }
      if (running) continue;
      if (std::all_of(threads_.begin(), threads_.end(), [](const Thread& t) { return t.finished; })) break;
      if (!Meet() && !ran) Die(0, "threads wait for each other for ever: not all of those that a barrier or a mask names came");
    }
    for (int t = 0; t < n; ++t) {
      const Thread& thread = threads_[t];
      if (!thread.open.empty() || !thread.groups.empty()) Die(t, "ends with asynchronous copies under way");
    }
    state_.counts.threads += n;
  }

 private:
  [[noreturn]] void Die(int t, const std::string& what) {
    char place[160];
    std::snprintf(place, sizeof place, " (block %u, %u, %u, thread %d, instruction %d)", index_.x, index_.y, index_.z, t,
                  threads_[t].pc);
    throw Fault(what + place);
  }
  static std::string At(uint64_t address, int bytes) {
    char text[80];
    std::snprintf(text, sizeof text, ", %d bytes at %#llx", bytes, static_cast<unsigned long long>(address));
    return text;
  }

  // --- Memory --------------------------------------------------------------------------------------------------------

  bool Ordered(int by, uint32_t barrier, uint32_t warp, int t) const {
    const Thread& thread = threads_[t];
    if (by == t || barrier < thread.barriers) return true;
    return by >= 0 && by / 32 == t / 32 && warp < thread.warp_barriers;
  }

  uint8_t* Shared(int t, uint64_t address, int bytes, bool write, bool in_flight = false) {
    address = uint32_t(address);
    if (address % bytes) Die(t, "misaligned access to shared memory" + At(address, bytes));
    if (address + bytes > shared_.size()) Die(t, "access beyond shared memory" + At(address, bytes));
    ++state_.counts.shared_accesses;
    const Thread& thread = threads_[t];
    for (int i = 0; i < bytes; ++i) {
      Touch& touch = touches_[address + i];
      if (touch.in_flight && !in_flight) Die(t, "touches shared memory that a copy under way writes" + At(address, bytes));
      if (touch.writer == -1) {
        if (!write) Die(t, "reads shared memory that nobody wrote" + At(address, bytes));
      } else if (!Ordered(touch.writer, touch.write_barrier, touch.write_warp, t)) {
        Die(t, std::string(write ? "writes" : "reads") + " shared memory that thread " + std::to_string(touch.writer) +
                   " wrote, and no barrier stands between" + At(address, bytes));
      }
      if (write) {
        const bool read_now = touch.reader != -1 && touch.read_barrier >= thread.barriers;
        if (read_now && touch.reader != t) {
          const bool ordered = !touch.several_warps && touch.reader >= 0 &&
                               Ordered(touch.reader, touch.read_barrier, touch.read_warp, t);
          if (!ordered) Die(t, "writes shared memory that another thread reads, and no barrier stands between" + At(address, bytes));
        }
        touch.writer = t;
        touch.write_barrier = thread.barriers;
        touch.write_warp = thread.warp_barriers;
        touch.in_flight = in_flight;
      } else {
        const bool fresh = touch.reader == -1 || touch.read_barrier < thread.barriers;
        // Of several readers of a warp the last stands for all: those before have passed no more barriers than it.
        touch.several_warps = !fresh && (touch.several_warps || touch.reader / 32 != t / 32);
        touch.reader = t;
        touch.read_barrier = thread.barriers;
        touch.read_warp = thread.warp_barriers;
      }
    }
    return shared_.data() + address;
  }

  uint8_t* Global(int t, uint64_t address, int bytes, bool write, bool atomic = false) {
    if (address % bytes) Die(t, "misaligned access to global memory" + At(address, bytes));
    state_.counts.global_bytes += bytes;
    for (Buffer& buffer : state_.buffers) {
      if (address - buffer.address >= buffer.bytes) continue;
      const uint64_t offset = address - buffer.address;
      if (offset + bytes > buffer.bytes) break;
      if (write && !buffer.writable) Die(t, "writes to " + buffer.name + ", which is an input" + At(offset, bytes));
      if (buffer.writable) {
        const uint64_t who = 1 + (launch_ << 40 | uint64_t(index_.x) << 12 | unsigned(t));
        for (uint64_t i = offset; i < offset + bytes; ++i) {
          if (!write && !buffer.written[i]) Die(t, "reads of " + buffer.name + " what nobody wrote" + At(offset, bytes));
          if (write && !atomic) {
            const uint64_t last = buffer.writer[i];
            if (last && last != who && (last - 1) >> 40 == launch_) Die(t, "writes to " + buffer.name + " where another thread wrote" + At(offset, bytes));
            buffer.writer[i] = who;
          }
          if (write) buffer.written[i] = 1;
        }
      }
      return buffer.host + offset;
    }
    std::string nearest;
    for (const Buffer& buffer : state_.buffers) {
      const int64_t beyond = int64_t(address - buffer.address);
      if (beyond > -(int64_t{1} << 36) && beyond < (int64_t{1} << 40)) nearest = "; from the start of " + buffer.name + ", which has " + std::to_string(buffer.bytes) + " bytes: " + std::to_string(beyond);
    }
    Die(t, std::string(write ? "writes" : "reads") + " beyond all buffers" + At(address, bytes) + nearest);
  }

  uint8_t* Local(int t, uint64_t address, int bytes, bool write) {
    Thread& thread = threads_[t];
    if (address % bytes || address + bytes > thread.local.size()) Die(t, "bad access to local memory" + At(address, bytes));
    for (int i = 0; i < bytes; ++i) {
      if (write) thread.local_written[address + i] = 1;
      if (!thread.local_written[address + i]) Die(t, "reads local memory that was not written" + At(address, bytes));
    }
    return thread.local.data() + address;
  }

  uint8_t* Access(int t, int space, uint64_t address, int bytes, bool write) {
    if (space == kGeneric) {
      space = address >= kSharedWindow ? kShared : kGlobal;
      if (space == kShared) address -= kSharedWindow;
    }
    switch (space) {
      case kGlobal: return Global(t, address, bytes, write);
      case kShared: return Shared(t, address, bytes, write);
      case kLocal: return Local(t, address, bytes, write);
      default:
        if (write || address + bytes > parameters_.size()) Die(t, "bad access to parameters" + At(address, bytes));
        return const_cast<uint8_t*>(parameters_.data()) + address;
    }
  }

  void Finish(int t, const Thread::Copy& copy) {
    for (int i = 0; i < copy.bytes; ++i) touches_[uint32_t(copy.shared) + i].in_flight = false;
    uint8_t* to = Shared(t, copy.shared, copy.bytes, true);
    std::memset(to, 0, copy.bytes);
    const int bytes = copy.bytes - copy.zeros;
    if (bytes) std::memcpy(to, Global(t, copy.global, bytes, false), bytes);
  }

  // --- One thread ----------------------------------------------------------------------------------------------------

  // As a wide integer, by its type.
  static __int128 Wide(uint64_t v, int32_t type) {
    return KindOf(type) == kSigned ? __int128(Extend(v, Bits(type))) : __int128(Truncate(v, Bits(type)));
  }
  static float Single(uint64_t v, int32_t type) { return KindOf(type) == kBfloat ? FromBfloat(v) : F(v); }

  static bool Holds(int mode, int32_t type, uint64_t a, uint64_t b, bool* ordered) {
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

  uint64_t Arithmetic(int t, const Instruction& i, uint64_t a, uint64_t b, uint64_t c) {
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
          default: Die(t, "an operation that floating point does not have");
        }
      };
      if (bits == 64) return FromD(compute(D(a), D(b), D(c)));
      const float result = compute(Single(a, i.type), Single(b, i.type), Single(c, i.type));
      return kind == kBfloat ? ToBfloat(result) : FromF(result);
    }
    if (kind == kBfloatPair) {
      Instruction half = i;
      half.type = kBfloat << 8 | 16;
      return Arithmetic(t, half, a, b, c) | Arithmetic(t, half, a >> 16, b >> 16, c >> 16) << 16;
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
        if (y == 0) Die(t, "divides by zero");
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
      default: Die(t, "an operation that integers do not have");
    }
  }

  uint64_t Convert(int t, const Instruction& i, uint64_t a, uint64_t b) {
    const int to = KindOf(i.type), from = KindOf(i.type2);
    if (to == kBfloatPair) return ToBfloat(F(b)) | ToBfloat(F(a)) << 16;
    if (to == kHalf || from == kHalf) Die(t, "float16 is not known here");
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

  void Step(int t) {
    Thread& thread = threads_[t];
    if (thread.pc < 0 || thread.pc >= int(p_.code.size())) Die(t, "runs beyond its code");
    const Instruction& i = p_.code[thread.pc];
    uint64_t* slots = thread.slots.data();
    if (++state_.counts.instructions > kMost) Die(t, "does not end");
    if (i.guard >= 0 && bool(slots[i.guard] & 1) == bool(i.negated)) {
      ++thread.pc;
      return;
    }
    const int32_t* args = i.arguments;
    auto in = [&](int k) { return k < i.count && args[k] >= 0 ? slots[args[k]] : 0; };
    auto set = [&](int k, uint64_t value, int bits) {
      if (args[k] >= 0) slots[args[k]] = Truncate(value, bits);
    };
    const int bits = Bits(i.type);
    switch (i.op) {
      case k_mov: set(0, in(1), bits); break;
      case k_nop: break;
      case k_pack: {
        uint64_t value = 0;
        const int part = bits / (i.count - 1);
        for (int k = 1; k < i.count; ++k) value |= Truncate(in(k), part) << (k - 1) * part;
        set(0, value, bits);
        break;
      }
      case k_unpack: {
        const uint64_t value = in(i.count - 1);
        const int part = bits / (i.count - 1);
        for (int k = 0; k < i.count - 1; ++k) set(k, value >> k * part, part);
        break;
      }
      case k_ld: case k_st: {  // address, offset, values
        const int bytes = bits / 8;
        uint8_t* at = Access(t, i.mode, in(0) + in(1), bytes * i.target, i.op == k_st);
        for (int k = 0; k < i.target; ++k, at += bytes) {
          uint64_t value = i.op == k_st ? in(2 + k) : 0;
          if (i.op == k_st) {
            std::memcpy(at, &value, bytes);
          } else {
            std::memcpy(&value, at, bytes);
            if (KindOf(i.type) == kSigned) value = uint64_t(Extend(value, bits));
            set(2 + k, value, 64);
          }
        }
        break;
      }
      case k_cvt: set(0, Convert(t, i, in(1), in(2)), KindOf(i.type2) == kSigned && KindOf(i.type) == kSigned ? 64 : bits); break;
      case k_mul_wide: case k_mad_wide: set(0, Arithmetic(t, i, in(1), in(2), in(3)), 2 * bits); break;
      case k_shf_l: case k_shf_r: {
        const uint64_t both = in(2) << 32 | Truncate(in(1), 32);
        const uint32_t by = i.mode ? std::min<uint32_t>(uint32_t(in(3)), 32) : uint32_t(in(3)) & 31;
        set(0, i.op == k_shf_r ? both >> by : both << by >> 32, 32);
        break;
      }
      case k_bfi: {  // into b the low bits of a
        const uint32_t pos = uint32_t(in(3)) & 255, len = uint32_t(in(4)) & 255;
        const uint64_t mask = pos >= unsigned(bits) ? 0 : Truncate(~uint64_t{0}, std::min<int>(len, 63) ? len : 0) << pos;
        set(0, (in(2) & ~mask) | (in(1) << (pos & 63) & mask), bits);
        break;
      }
      case k_bfe: {
        const int pos = int(in(2)) & 255, len = int(in(3)) & 255;
        const __int128 shifted = Wide(in(1), i.type) >> std::min(pos, 64);
        uint64_t value = len ? Truncate(uint64_t(shifted), std::min(len, 64)) : 0;
        if (KindOf(i.type) == kSigned && len && len < bits) value = uint64_t(Extend(value, len));
        set(0, value, bits);
        break;
      }
      case k_popc: set(0, __builtin_popcountll(Truncate(in(1), bits)), 32); break;
      case k_clz: set(0, in(1) ? __builtin_clzll(Truncate(in(1), bits)) - (64 - bits) : bits, 32); break;
      case k_bfind: set(0, in(1) ? 63 - __builtin_clzll(Truncate(in(1), bits)) : ~uint64_t{0}, 32); break;
      case k_brev: {
        uint64_t value = 0;
        for (int k = 0; k < bits; ++k) value |= (in(1) >> k & 1) << (bits - 1 - k);
        set(0, value, bits);
        break;
      }
      case k_prmt: {
        const uint64_t both = in(2) << 32 | Truncate(in(1), 32);
        uint64_t value = 0;
        for (int k = 0; k < 4; ++k) {
          const int selector = int(in(3) >> 4 * k) & 15;
          uint64_t byte = both >> 8 * (selector & 7) & 255;
          if (selector & 8) byte = byte & 128 ? 255 : 0;
          value |= byte << 8 * k;
        }
        set(0, value, 32);
        break;
      }
      case k_lop3: {
        uint32_t value = 0;
        for (int k = 0; k < 32; ++k) {
          const int row = int(in(1) >> k & 1) << 2 | int(in(2) >> k & 1) << 1 | int(in(3) >> k & 1);
          value |= uint32_t(in(4) >> row & 1) << k;
        }
        set(0, value, 32);
        break;
      }
      case k_setp: case k_set: {  // result, complement, a, b
        bool ordered;
        const bool holds = Holds(i.mode & 15, i.type, in(2), in(3), &ordered) || (i.mode & 16 && !ordered);
        if (i.op == k_set) {
          set(0, holds ? ~uint64_t{0} : 0, 32);
        } else {
          set(0, holds, 1);
          set(1, !holds, 1);
        }
        break;
      }
      case k_selp: set(0, in(3) & 1 ? in(1) : in(2), bits); break;
      case k_bra: thread.pc = i.target; return;
      case k_ret: thread.finished = true; return;
      case k_trap: Die(t, "trap");
      case k_to_shared: set(0, in(1) - kSharedWindow, bits); break;
      case k_from_shared: set(0, in(1) + kSharedWindow, bits); break;
      case k_atom: case k_red: {  // result (atom), address, offset, value, other value
        const int first = i.op == k_atom;
        Instruction own = i;
        own.op = k_add;
        const int space = i.target, bytes = bits / 8;
        uint8_t* at;
        if (space == kShared) {
          Die(t, "atomics on shared memory are not known here");
        } else {
          at = Global(t, in(first) + in(first + 1), bytes, false, true);
          at = Global(t, in(first) + in(first + 1), bytes, true, true);
        }
        uint64_t old = 0, value = in(first + 2), result = value;
        std::memcpy(&old, at, bytes);
        switch (i.mode) {
          case kAdd: result = Arithmetic(t, own, old, value, 0); break;
          case kMin: own.op = k_min; result = Arithmetic(t, own, old, value, 0); break;
          case kMax: own.op = k_max; result = Arithmetic(t, own, old, value, 0); break;
          case kExch: break;
          case kCas: result = old == value ? in(first + 3) : old; break;
          case kAtomAnd: result = old & value; break;
          case kAtomOr: result = old | value; break;
          case kInc: result = old >= value ? 0 : old + 1; break;
        }
        std::memcpy(at, &result, bytes);
        if (first) set(0, old, bits);
        break;
      }
      case k_cp_async: {  // shared, offset, global, offset, bytes, bytes of the source
        const int bytes = int(in(4)), source = i.count > 5 ? int(in(5)) : bytes;
        if (source > bytes) Die(t, "an asynchronous copy of more than its size");
        const uint64_t shared = in(0) + in(1), global = in(2) + in(3);
        if (global % bytes) Die(t, "misaligned asynchronous copy" + At(global, bytes));
        Shared(t, shared, bytes, true, true);
        if (source) Global(t, global, source == bytes ? bytes : 1, false);
        thread.open.push_back({shared, global, bytes, bytes - source});
        break;
      }
      case k_commit:
        thread.groups.push_back(std::move(thread.open));
        thread.open.clear();
        break;
      case k_wait_group: case k_wait_all: {
        if (i.op == k_wait_all) {
          thread.groups.push_back(std::move(thread.open));
          thread.open.clear();
        }
        const size_t keep = i.op == k_wait_all ? 0 : size_t(in(0));
        while (thread.groups.size() > keep) {
          for (const auto& copy : thread.groups.front()) Finish(t, copy);
          thread.groups.erase(thread.groups.begin());
        }
        break;
      }
      case k_bar: case k_warp_sync: case k_shfl: case k_vote: case k_match_any: case k_redux: case k_ldmatrix: case k_mma:
        thread.waiting = true;
        return;  // `Meet` goes on
      default: set(0, Arithmetic(t, i, in(1), in(2), in(3)), bits);
    }
    ++thread.pc;
  }

  // --- Threads together ----------------------------------------------------------------------------------------------

  // Lets those go on whose others have come too; whether there were any.
  bool Meet() {
    bool met = false;
    const int n = int(threads_.size());
    bool everyone = true;
    for (int t = 0; t < n; ++t) {
      const Thread& thread = threads_[t];
      everyone &= thread.finished || (thread.waiting && p_.code[thread.pc].op == k_bar);
    }
    if (everyone) {
      ++state_.counts.barriers;
      for (int t = 0; t < n; ++t) {
        Thread& thread = threads_[t];
        if (thread.finished) continue;
        for (int other = t / 32 * 32; other < t; ++other) {
          if (!threads_[other].finished && threads_[other].pc != thread.pc + 1) Die(t, "lanes of a warp wait at different barriers");
        }
        thread.waiting = false;
        ++thread.barriers;
        ++thread.pc;
      }
      return true;
    }
    for (int warp = 0; warp < n; warp += 32) {
      const int lanes = std::min(32, n - warp);
      for (int lane = 0; lane < lanes; ++lane) {
        const Thread& thread = threads_[warp + lane];
        if (thread.finished || !thread.waiting || p_.code[thread.pc].op == k_bar) continue;
        const Instruction& i = p_.code[thread.pc];
        // Matrix operations take whole warps; the others name their lanes in the last argument.
        const uint32_t whole = lanes == 32 ? ~0u : (1u << lanes) - 1;
        const bool aligned = i.op == k_ldmatrix || i.op == k_mma;
        const uint32_t mask = aligned ? ~0u : uint32_t(thread.slots[i.arguments[i.count - 1]]);
        if (!(mask >> lane & 1)) Die(warp + lane, "a lane that its own mask leaves out");
        bool came = true;
        for (int k = 0; k < 32; ++k) {
          if (!(mask >> k & 1)) continue;
          if (!(whole >> k & 1) && aligned) Die(warp + lane, "a matrix operation of less than a warp");
          if (!(whole >> k & 1)) continue;
          const Thread& other = threads_[warp + k];
          if (other.finished) Die(warp + lane, "waits for lane " + std::to_string(k) + ", which has ended");
          came &= other.waiting && other.pc == thread.pc;
        }
        if (!came) continue;
        Together(warp, mask & whole, i);
        for (int k = 0; k < lanes; ++k) {
          if (!(mask >> k & 1)) continue;
          Thread& other = threads_[warp + k];
          other.waiting = false;
          ++other.pc;
          if (i.op == k_warp_sync && (mask & whole) == whole) ++other.warp_barriers;
        }
        met = true;
      }
    }
    return met;
  }

  void Together(int warp, uint32_t mask, const Instruction& i) {
    const int32_t* args = i.arguments;
    auto get = [&](int lane, int k) { return threads_[warp + lane].slots[args[k]]; };
    auto put = [&](int lane, int k, uint64_t v) {
      if (args[k] >= 0) threads_[warp + lane].slots[args[k]] = v;
    };
    auto each = [&](auto f) {
      for (int lane = 0; lane < 32; ++lane) {
        if (mask >> lane & 1) f(lane);
      }
    };
    uint64_t results[32] = {};
    switch (i.op) {
      case k_warp_sync: return;
      case k_shfl: {  // result, predicate, value, lane, clamp, mask
        bool valid[32] = {};
        each([&](int lane) {
          const int b = int(get(lane, 3)) & 31, c = int(get(lane, 4)), segment = c >> 8 & 31, clamp = c & 31;
          const int most = (lane & segment) | (clamp & ~segment), least = lane & segment;
          int from = i.mode == kUp ? lane - b : i.mode == kDown ? lane + b : i.mode == kButterfly ? lane ^ b : least | (b & ~segment);
          valid[lane] = i.mode == kUp ? from >= most : from <= most;
          if (!valid[lane]) from = lane;
          if (!(mask >> from & 1)) Die(warp + lane, "shuffles from lane " + std::to_string(from) + ", which takes no part");
          results[lane] = get(from, 2);
        });
        each([&](int lane) {
          put(lane, 0, Truncate(results[lane], 32));
          put(lane, 1, valid[lane]);
        });
        return;
      }
      case k_vote: {  // result, predicate, mask
        uint32_t ballot = 0;
        each([&](int lane) { ballot |= uint32_t((get(lane, 1) ^ uint64_t(i.target)) & 1) << lane; });
        each([&](int lane) { put(lane, 0, i.mode == kBallot ? ballot : i.mode == kAny ? ballot != 0 : ballot == mask); });
        return;
      }
      case k_match_any: {  // result, value, mask
        each([&](int lane) {
          each([&](int other) { results[lane] |= uint64_t(Truncate(get(lane, 1), Bits(i.type)) == Truncate(get(other, 1), Bits(i.type))) << other; });
        });
        each([&](int lane) { put(lane, 0, results[lane]); });
        return;
      }
      case k_redux: {  // result, value, mask
        const int first = __builtin_ctz(mask);
        Instruction own = i;
        own.op = i.mode;
        uint64_t value = get(first, 1);
        each([&](int lane) {
          if (lane != first) value = Truncate(Arithmetic(warp + lane, own, value, get(lane, 1), 0), 32);
        });
        each([&](int lane) { put(lane, 0, value); });
        return;
      }
      case k_ldmatrix: {  // results, address, offset; target: how many; mode: transposed
        const int n = i.target;
        uint16_t rows[4][8][8];
        for (int m = 0; m < n; ++m) {
          for (int r = 0; r < 8; ++r) {
            const int lane = 8 * m + r;
            std::memcpy(rows[m][r], Shared(warp + lane, get(lane, n) + get(lane, n + 1), 16, false), 16);
          }
        }
        each([&](int lane) {
          for (int m = 0; m < n; ++m) {
            const int a = lane / 4, b = lane % 4 * 2;
            const uint32_t low = i.mode ? rows[m][b][a] : rows[m][a][b], high = i.mode ? rows[m][b + 1][a] : rows[m][a][b + 1];
            put(lane, m, low | high << 16);
          }
        });
        return;
      }
      case k_mma: Mma(warp, i); return;
      default: Die(warp, "an operation of warps that is not known here");
    }
  }

  // m16n8k16 and m16n8k8 of bfloat16 (target: k), float32 sums: d, a, b, c as the PTX manual lays them out over lanes.
  void Mma(int warp, const Instruction& i) {
    const int depth = i.target, a_count = depth / 4, b_count = depth / 8;
    float a[16][16], b[16][8], c[16][8];
    auto get = [&](int lane, int k) { return threads_[warp + lane].slots[i.arguments[k]]; };
    for (int lane = 0; lane < 32; ++lane) {
      const int group = lane / 4, pair = lane % 4 * 2;
      for (int e = 0; e < 2 * a_count; ++e) {
        a[group + 8 * (e / 2 % 2)][pair + e % 2 + 8 * (e / 4)] = FromBfloat(get(lane, 4 + e / 2) >> 16 * (e % 2));
      }
      for (int e = 0; e < 2 * b_count; ++e) {
        b[pair + e % 2 + 8 * (e / 2)][group] = FromBfloat(get(lane, 4 + a_count + e / 2) >> 16 * (e % 2));
      }
      for (int e = 0; e < 4; ++e) c[group + 8 * (e / 2)][pair + e % 2] = F(get(lane, 4 + a_count + b_count + e));
    }
    for (int lane = 0; lane < 32; ++lane) {
      const int group = lane / 4, pair = lane % 4 * 2;
      for (int e = 0; e < 4; ++e) {
        const int row = group + 8 * (e / 2), column = pair + e % 2;
        double sum = c[row][column];
        for (int k = 0; k < depth; ++k) sum += double(a[row][k]) * b[k][column];
        threads_[warp + lane].slots[i.arguments[e]] = FromF(float(sum));
      }
    }
  }

  static constexpr int64_t kMost = int64_t{1} << 36;

  const Program& p_;
  const std::vector<uint8_t>& parameters_;
  const uint64_t launch_;
  State& state_;
  std::mt19937 random_;
  std::vector<uint8_t> shared_;
  std::vector<Touch> touches_;
  std::vector<Thread> threads_;
  Dim index_;
};

}  // namespace

State& TheState() {
  static State state;
  return state;
}

void Launch(const Program& program, Dim grid, Dim block, uint64_t dynamic_shared, void* const* arguments) {
  std::vector<uint8_t> parameters;
  for (size_t i = 0; i < program.parameters.size(); i += 2) {
    const int bytes = program.parameters[i], alignment = program.parameters[i + 1];
    parameters.resize((parameters.size() + alignment - 1) / alignment * alignment);
    const auto* from = static_cast<const uint8_t*>(arguments[i / 2]);
    parameters.insert(parameters.end(), from, from + bytes);
  }
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (!threads || threads > 1024 || !grid.x || grid.x > 0x7fffffffu || !grid.y || grid.y > 65535 || !grid.z || grid.z > 65535) {
    throw Fault("a launch that no GPU takes: grid or block out of range");
  }
  if (program.most_threads && threads > uint64_t(program.most_threads)) throw Fault("a launch of more threads than the kernel is built for");
  State& state = TheState();
  const uint64_t launch = uint64_t(++state.counts.launches);
  ++program.launches;
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  for (uint64_t i = 0; i < blocks; ++i) {
    const uint64_t b = state.order == kBackwards ? blocks - 1 - i : i;
    const Dim index{uint32_t(b % grid.x), uint32_t(b / grid.x % grid.y), uint32_t(b / grid.x / grid.y)};
    Block(program, index, grid, block, dynamic_shared, parameters, launch).Run();
  }
}

}  // namespace ptx

// --- For Python ------------------------------------------------------------------------------------------------------

static std::string fault;

extern "C" {

const char* PtxNames() {
#define X(name) #name " "
  return OPS(X);
#undef X
}

void PtxLoad(const char* name, const int32_t* code, int64_t instructions, const uint64_t* slots, int64_t num_slots,
             const int32_t* parameters, int64_t num_parameters, int64_t shared, int64_t local, int64_t most_threads) {
  ptx::Program& program = ptx::TheState().programs[name];
  const auto* first = reinterpret_cast<const ptx::Instruction*>(code);
  program = {{first, first + instructions}, {slots, slots + num_slots}, {parameters, parameters + 2 * num_parameters}, shared, local, most_threads};
}

void PtxClear() {
  ptx::TheState().buffers.clear();
  ptx::TheState().counts = {};
}

void PtxBuffer(const char* name, uint64_t address, uint64_t bytes, void* host, bool writable) {
  ptx::Buffer buffer{name, address, bytes, static_cast<uint8_t*>(host), writable, {}, {}};
  if (writable) {
    buffer.written.resize(bytes);
    buffer.writer.resize(bytes);
  }
  ptx::TheState().buffers.push_back(std::move(buffer));
}

void PtxOrder(int order, uint32_t seed) {
  ptx::TheState().order = static_cast<ptx::Order>(order);
  ptx::TheState().seed = seed;
}

int64_t PtxLaunches(const char* name) { return ptx::TheState().programs.at(name).launches; }

// What went wrong, or an empty text.
const char* PtxLaunch(const char* name, const uint32_t* grid, const uint32_t* block, uint64_t shared, void* const* arguments) {
  fault.clear();
  try {
    ptx::Launch(ptx::TheState().programs.at(name), {grid[0], grid[1], grid[2]}, {block[0], block[1], block[2]}, shared, arguments);
  } catch (const std::exception& error) {
    fault = error.what();
  }
  return fault.c_str();
}

void PtxCounts(int64_t* out) { *reinterpret_cast<ptx::Counts*>(out) = ptx::TheState().counts; }

}  // extern "C"
