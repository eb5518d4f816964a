// A machine that runs PTX: what ptx_machine.py hands over, and what a CUDA runtime needs of it.
//
// Threads run one at a time, in a chosen order, each up to where it has to wait for others. Every access to memory is
// checked: that it lies in one buffer, is aligned, does not write to an input, does not read what nobody wrote, and
// that a barrier stands between it and what another thread does to the same bytes.

#pragma once

#include <cstdint>
#include <cstdio>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

namespace ptx {

// One instruction. Operands are slots of a thread: registers, and behind them constants and special registers.
struct Instruction {
  int32_t op;
  int32_t type, type2;      // of the result or the access; of what is converted. Bits, and 256 x kind.
  int32_t mode;             // of the operation: comparison, address space, shuffle, ...
  int32_t guard, negated;   // slot of a predicate, or -1
  int32_t target;           // of a branch; vector length of loads and stores
  int32_t count;            // of arguments
  int32_t arguments[24];    // slots; -1 where the result is dropped
};

struct Program {
  std::vector<Instruction> code;
  std::vector<uint64_t> slots;       // what they hold at the start
  std::vector<int32_t> parameters;   // bytes and alignment of each, alternating
  int64_t shared = 0, local = 0;     // bytes, static
  int64_t most_threads = 0;          // .maxntid; 0 where nothing is said
  mutable int64_t launches = 0;
};

struct Dim { uint32_t x, y, z; };

// A buffer of the device. Addresses are made up, so that nothing else can reach it.
struct Buffer {
  std::string name;
  uint64_t address;
  uint64_t bytes;
  uint8_t* host;
  bool writable;
  std::vector<uint8_t> written;   // of a writable one: by byte
  std::vector<uint64_t> writer;   // of a writable one: 1 + launch and thread that wrote it last without an atomic
};

enum Order { kForwards, kBackwards, kShuffled };

struct Counts {
  int64_t launches, threads, instructions, barriers, global_bytes, shared_accesses;
};

struct State {
  std::map<std::string, Program> programs;
  std::vector<Buffer> buffers;
  Order order = kForwards;
  uint32_t seed = 0;
  Counts counts{};
};

State& TheState();

class Fault : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// Runs all threads; throws Fault. `arguments` point to the kernel's parameters, one each.
void Launch(const Program& program, Dim grid, Dim block, uint64_t dynamic_shared, void* const* arguments);

}  // namespace ptx
