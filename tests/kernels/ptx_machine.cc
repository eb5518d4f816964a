// See ptx_machine.h.

#include "ptx_machine.h"

#include <algorithm>
#include <cstring>
#include <random>

#include "ptx_instructions.h"
#include "ptx_memory.h"

namespace ptx {

namespace {

class Block : Memory {
 public:
  Block(const Program& program, Dim index, Dim grid, Dim size, uint64_t dynamic, const std::vector<uint8_t>& parameters,
        uint64_t launch)
      : Memory(parameters, launch, index, program.shared + dynamic, size_t{size.x} * size.y * size.z), p_(program),
        random_(state_.seed + index.x * 7919u) {
    for (uint32_t t = 0; t < threads_.size(); ++t) {
      Thread& thread = threads_[t];
      thread.slots = program.slots;
      thread.local.resize(program.local);
      thread.local_written.resize(program.local);
      const uint64_t special[] = {t % size.x, t / size.x % size.y, t / size.x / size.y, size.x, size.y, size.z,
                                  index.x, index.y, index.z, grid.x, grid.y, grid.z, t % 32, t / 32};
      std::copy(std::begin(special), std::end(special), thread.slots.begin());
    }
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
        for (int64_t i = 0; i < steps && !thread.finished && !thread.waiting; ++i) TryStep(t);
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
  void TryStep(int t) {
    try {
      Step(t);
    } catch (const std::domain_error& error) {
      Die(t, error.what());
    }
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
      case k_cvt: set(0, Convert(i, in(1), in(2)), KindOf(i.type2) == kSigned && KindOf(i.type) == kSigned ? 64 : bits); break;
      case k_mul_wide: case k_mad_wide: set(0, Arithmetic(i, in(1), in(2), in(3)), 2 * bits); break;
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
        const int bytes = bits / 8;
        const uint64_t address = in(first) + in(first + 1);
        uint8_t* at = nullptr;
        for (bool write : {false, true}) {
          at = i.target == kShared ? Shared(t, address, bytes, write, false, true) : Global(t, address, bytes, write, true);
        }
        uint64_t old = 0, value = in(first + 2), result = value;
        std::memcpy(&old, at, bytes);
        switch (i.mode) {
          case kAdd: result = Arithmetic(own, old, value, 0); break;
          case kMin: own.op = k_min; result = Arithmetic(own, old, value, 0); break;
          case kMax: own.op = k_max; result = Arithmetic(own, old, value, 0); break;
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
      default: set(0, Arithmetic(i, in(1), in(2), in(3)), bits);
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
          if (lane != first) value = Truncate(Arithmetic(own, value, get(lane, 1), 0), 32);
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
  std::mt19937 random_;
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
