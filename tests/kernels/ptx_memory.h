// The memory that a block of threads sees, every access checked. See ptx_machine.h.

#pragma once

#include <cstring>
#include <string>

#include "ptx_machine.h"

namespace ptx {

// Where generic addresses mean shared memory. Low bits zero, so that offsets stay what they are modulo 2^32.
constexpr uint64_t kSharedWindow = 0xffff000000000000ull;
enum Space { kGeneric, kGlobal, kShared, kLocal, kParam };

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
  int32_t atomic = -1;  // the thread of the last atomic since then; -2: several
  uint32_t atomic_barrier = 0, atomic_warp = 0;
};

class Memory {
 public:
  Memory(const std::vector<uint8_t>& parameters, uint64_t launch, Dim index, uint64_t shared_bytes, size_t threads)
      : state_(TheState()), index_(index), threads_(threads), parameters_(parameters), launch_(launch),
        shared_(shared_bytes, 0xcd), touches_(shared_bytes) {}

 protected:
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

  bool Ordered(int by, uint32_t barrier, uint32_t warp, int t) const {
    const Thread& thread = threads_[t];
    if (by == t || barrier < thread.barriers) return true;
    return by >= 0 && by / 32 == t / 32 && warp < thread.warp_barriers;
  }

  uint8_t* Shared(int t, uint64_t address, int bytes, bool write, bool in_flight = false, bool atomic = false) {
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
      if (touch.atomic != -1 && !atomic && !Ordered(touch.atomic, touch.atomic_barrier, touch.atomic_warp, t)) {
        Die(t, "accesses shared memory after an atomic of another thread, and no barrier stands between" + At(address, bytes));
      }
      if (write) {
        const bool read_now = touch.reader != -1 && touch.read_barrier >= thread.barriers;
        if (read_now && touch.reader != t) {
          const bool ordered = !touch.several_warps && touch.reader >= 0 &&
                               Ordered(touch.reader, touch.read_barrier, touch.read_warp, t);
          if (!ordered) Die(t, "writes shared memory that another thread reads, and no barrier stands between" + At(address, bytes));
        }
        if (atomic) {
          const bool first = touch.atomic == -1 || touch.atomic_barrier < thread.barriers || touch.atomic == t;
          touch.atomic = first ? t : -2;
          touch.atomic_barrier = thread.barriers;
          touch.atomic_warp = thread.warp_barriers;
          continue;
        }
        touch.writer = t;
        touch.write_barrier = thread.barriers;
        touch.write_warp = thread.warp_barriers;
        touch.in_flight = in_flight;
        touch.atomic = -1;
      } else if (!atomic) {
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

  State& state_;
  const Dim index_;
  std::vector<Thread> threads_;

 private:
  const std::vector<uint8_t>& parameters_;
  const uint64_t launch_;
  std::vector<uint8_t> shared_;
  std::vector<Touch> touches_;
};

}  // namespace ptx
