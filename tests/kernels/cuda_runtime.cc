// As much of a CUDA runtime as the kernels' host code calls. Linked with the object that nvcc makes of an unmodified
// source, in place of libcudart: kernels run on ptx_machine.cc, and XLA handlers on JAX's CPU backend.
//
// Handlers see made-up device addresses: one that reads through a pointer crashes. HANDLERS lists them, as X(name)...;
// for each there is OnCpu_name, which is registered instead.

#include <cstring>
#include <memory>
#include <mutex>
#include <set>
#include <utility>

#include "ptx_machine.h"
#include "xla/ffi/api/c_api.h"

namespace {

using ptx::Dim;

// By what only happens at load, if a graph of calls is to be captured.
struct Calls { int64_t attributes, allocations, loads, synchronizations, copies, memsets; };

struct Configuration { Dim grid, block; size_t bytes; void* stream; };

struct Runtime {
  std::map<const void*, std::string> kernels;      // host function to name
  std::map<const void*, int64_t> dynamic_shared;   // what the attribute allows
  std::vector<Configuration> configurations;
  std::map<uint64_t, std::unique_ptr<uint8_t[]>> allocations;
  Calls calls{};
  std::set<const void*> loaded;
  bool capturing = false;
  int error = 0;
  std::string text = "no error";
};

Runtime& TheRuntime() {
  static Runtime runtime;
  return runtime;
}

constexpr int64_t kSharedByDefault = 48 << 10, kSharedAtMost = 99 << 10;  // of GPUs of capability 8.6 and 8.9 and 12.0
constexpr uint64_t kFirstAddress = uint64_t{1} << 44;
void* const kStream = reinterpret_cast<void*>(0x5151);
std::mutex mutex;

int Fail(int code, const std::string& text) {
  TheRuntime().error = code;
  TheRuntime().text = text;
  return code;
}

// Kernels are loaded when they are first launched or asked about.
void Load(const void* function) { TheRuntime().calls.loads += TheRuntime().loaded.insert(function).second; }

// What must not happen while a graph is captured.
bool Forbidden(const char* what) {
  if (TheRuntime().capturing) Fail(900, std::string(what) + " during capture");
  return TheRuntime().capturing;
}

// XLA aligns buffers to 128 bytes, and no further.
uint64_t NextAddress(uint64_t bytes) {
  static uint64_t next = kFirstAddress;
  const uint64_t address = next + 128;
  next += (bytes + (1 << 20)) / 256 * 256 + 256;
  return address;
}

uint8_t* Host(uint64_t address, size_t bytes) {
  for (auto& buffer : ptx::TheState().buffers) {
    if (address - buffer.address < buffer.bytes && address + bytes <= buffer.address + buffer.bytes) {
      if (buffer.writable) std::fill_n(buffer.written.begin() + (address - buffer.address), bytes, 1);
      return buffer.host + (address - buffer.address);
    }
  }
  return nullptr;
}

uint64_t Address(const void* p) { return reinterpret_cast<uint64_t>(p); }

}  // namespace

extern "C" {

void** __cudaRegisterFatBinary(void*) {
  static void* handle;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, void*, void*, void*, void*, int*) {
  TheRuntime().kernels[host] = name;
}
unsigned __cudaPushCallConfiguration(Dim grid, Dim block, size_t bytes, void* stream) {
  TheRuntime().configurations.push_back({grid, block, bytes, stream});
  return 0;
}
int __cudaPopCallConfiguration(Dim* grid, Dim* block, size_t* bytes, void** stream) {
  const Configuration c = TheRuntime().configurations.back();
  TheRuntime().configurations.pop_back();
  *grid = c.grid, *block = c.block, *bytes = c.bytes, *stream = c.stream;
  return 0;
}
int __cudaGetKernel(void** kernel, const void* function) {
  *kernel = const_cast<void*>(function);
  return 0;
}
int __cudaLaunchKernel(void* function, Dim grid, Dim block, void** arguments, size_t bytes, void*) {
  Runtime& runtime = TheRuntime();
  const auto name = runtime.kernels.find(function);
  if (name == runtime.kernels.end()) return Fail(98, "a kernel that was never registered");
  const auto& programs = ptx::TheState().programs;
  const auto program = programs.find(name->second);
  if (program == programs.end()) return Fail(98, "no PTX of " + name->second);
  const int64_t allowed = std::max(runtime.dynamic_shared[function], kSharedByDefault - program->second.shared);
  if (int64_t(bytes) > allowed) return Fail(1, "more dynamic shared memory than the attribute allows");
  Load(function);
  try {
    ptx::Launch(program->second, grid, block, bytes, arguments);
  } catch (const ptx::Fault& fault) {
    return Fail(700, fault.what());
  }
  return 0;
}
int cudaLaunchKernel(const void* function, Dim grid, Dim block, void** arguments, size_t bytes, void* stream) {
  return __cudaLaunchKernel(const_cast<void*>(function), grid, block, arguments, bytes, stream);
}
int cudaFuncSetAttribute(const void* function, int attribute, int value) {
  if (Forbidden("an attribute is set")) return 900;
  ++TheRuntime().calls.attributes;
  if (attribute == 9) return 0;  // the share of shared memory: a preference
  if (attribute != 8) return Fail(1, "an attribute that is not known here");
  if (value > kSharedAtMost) return Fail(1, "more shared memory than some GPUs have");
  TheRuntime().dynamic_shared[function] = value;
  return 0;
}
int cudaMalloc(void** pointer, size_t bytes) {
  if (Forbidden("memory is allocated")) return 900;
  ++TheRuntime().calls.allocations;
  const uint64_t address = NextAddress(bytes);
  auto& memory = TheRuntime().allocations[address] = std::make_unique<uint8_t[]>(bytes);
  std::memset(memory.get(), 0xff, bytes);
  ptx::TheState().buffers.push_back({"an allocation", address, bytes, memory.get(), true, std::vector<uint8_t>(bytes), std::vector<uint64_t>(bytes)});
  *pointer = reinterpret_cast<void*>(address);
  return 0;
}
int cudaFree(void* pointer) {
  if (Forbidden("memory is freed")) return 900;
  ++TheRuntime().calls.allocations;
  auto& buffers = ptx::TheState().buffers;
  for (size_t i = 0; i < buffers.size(); ++i) {
    if (buffers[i].address == Address(pointer)) buffers.erase(buffers.begin() + i--);
  }
  TheRuntime().allocations.erase(Address(pointer));
  return 0;
}
int cudaMemcpyAsync(void* to, const void* from, size_t bytes, int kind, void*) {
  ++TheRuntime().calls.copies;
  if (kind < 1 || kind > 3) return Fail(1, "a copy of a kind that is not known here");
  auto* target = kind == 2 ? static_cast<uint8_t*>(to) : Host(Address(to), bytes);
  const auto* source = kind == 1 ? static_cast<const uint8_t*>(from) : Host(Address(from), bytes);
  if (!target || !source) return Fail(700, "a copy beyond all buffers");
  std::memcpy(target, source, bytes);
  return 0;
}
int cudaMemcpy(void* to, const void* from, size_t bytes, int kind) {
  return Forbidden("memory is copied") ? 900 : cudaMemcpyAsync(to, from, bytes, kind, nullptr);
}
int cudaMemset(void* to, int value, size_t bytes) {
  ++TheRuntime().calls.memsets;
  auto* target = Host(Address(to), bytes);
  if (!target) return Fail(700, "memory is set beyond all buffers");
  std::memset(target, value, bytes);
  return 0;
}
int cudaMemsetAsync(void* to, int value, size_t bytes, void*) { return cudaMemset(to, value, bytes); }
int cudaStreamSynchronize(void*) {
  if (Forbidden("a stream is waited for")) return 900;
  return ++TheRuntime().calls.synchronizations, 0;
}
int cudaDeviceSynchronize() { return cudaStreamSynchronize(nullptr); }
// Captured launches run at once; a replay does nothing, and takes a millisecond.
int cudaStreamBeginCapture(void*, int) { return TheRuntime().capturing = true, 0; }
int cudaStreamEndCapture(void*, void** graph) { return TheRuntime().capturing = false, *graph = kStream, 0; }
int cudaGraphInstantiate(void** program, void*, unsigned long long) { return *program = kStream, 0; }
int cudaGraphLaunch(void*, void*) { return 0; }
int cudaGraphDestroy(void*) { return 0; }
int cudaGraphExecDestroy(void*) { return 0; }
int cudaEventCreate(void** event) { return *event = kStream, 0; }
int cudaEventDestroy(void*) { return 0; }
int cudaEventRecord(void*, void*) { return 0; }
int cudaEventElapsedTime(float* milliseconds, void*, void*) { return *milliseconds = 1, 0; }
int cudaStreamCreateWithFlags(void** stream, unsigned) { return *stream = kStream, 0; }
int cudaStreamDestroy(void*) { return 0; }
int cudaFuncGetAttributes(void*, const void* function) {
  Load(function);
  return 0;
}
int cudaGetDevice(int* device) { return *device = 0, 0; }
int cudaGetDeviceCount(int* count) { return *count = 1, 0; }
int cudaSetDevice(int) { return 0; }
int cudaDeviceGetAttribute(int* value, int attribute, int) {
  const std::map<int, int> known = {{16, 84}, {75, 8}, {76, 6}, {97, int(kSharedAtMost)}, {8, int(kSharedByDefault)}};
  if (!known.count(attribute)) return Fail(1, "an attribute of devices that is not known here");
  return *value = known.at(attribute), 0;
}
int cudaGetLastError() { return std::exchange(TheRuntime().error, 0); }
int cudaPeekAtLastError() { return TheRuntime().error; }
// cuBLAS, as far as bounds go: matrices of bfloat16 [rows, columns], columns `stride` apart.
int cublasCreate_v2(void** handle) { return *handle = kStream, 0; }
int cublasDestroy_v2(void*) { return 0; }
int cublasSetStream_v2(void*, void*) { return 0; }
int cublasSetWorkspace_v2(void*, void* at, size_t bytes) { return Host(Address(at), bytes) ? 0 : 7; }
int cublasGemmEx(void*, int a_transposed, int, int m, int n, int k, const void*, const void* a, int, int a_stride,
                 const void* b, int, int b_stride, const void*, void* c, int, int c_stride, int, int) {
  const auto fits = [](const void* at, int64_t rows, int64_t columns, int64_t stride) {
    return stride >= rows && Host(Address(at), ((columns - 1) * stride + rows) * 2);
  };
  const bool good = fits(a, a_transposed ? k : m, a_transposed ? m : k, a_stride) && fits(b, k, n, b_stride) && fits(c, m, n, c_stride);
  return good ? 0 : 7;
}
int cublasGemmBatchedEx(void* h, int a_transposed, int b_transposed, int m, int n, int k, const void* one, const void* a, int at,
                        int a_stride, const void* b, int bt, int b_stride, const void* zero, void* c, int ct, int c_stride,
                        int batch, int sums, int algorithm) {
  int status = 0;
  for (int i = 0; i < batch && !status; ++i) {
    const auto of = [i](const void* table) {
      auto* own = reinterpret_cast<void**>(Host(Address(table) + i * sizeof(void*), sizeof(void*)));
      return own ? *own : nullptr;
    };
    status = cublasGemmEx(h, a_transposed, b_transposed, m, n, k, one, of(a), at, a_stride, of(b), bt, b_stride, zero, of(c), ct, c_stride, sums, algorithm);
  }
  return status;
}
const char* cudaGetErrorString(int) { return TheRuntime().text.c_str(); }
const char* cudaGetErrorName(int) { return "cudaError"; }

// --- For Python ------------------------------------------------------------------------------------------------------

void RuntimeCalls(int64_t* out) { *reinterpret_cast<Calls*>(out) = TheRuntime().calls; }
void RuntimeClear() { TheRuntime().calls = {}; }

}  // extern "C"

static XLA_FFI_Error* Stream(XLA_FFI_Stream_Get_Args* arguments) {
  arguments->stream = kStream;
  return nullptr;
}

static uint64_t Bytes(const XLA_FFI_Buffer& buffer) {
  uint64_t n = 0;
  switch (buffer.dtype) {
    case XLA_FFI_DataType_PRED: case XLA_FFI_DataType_S8: case XLA_FFI_DataType_U8: n = 1; break;
    case XLA_FFI_DataType_S16: case XLA_FFI_DataType_U16: case XLA_FFI_DataType_F16: case XLA_FFI_DataType_BF16: n = 2; break;
    case XLA_FFI_DataType_S32: case XLA_FFI_DataType_U32: case XLA_FFI_DataType_F32: n = 4; break;
    case XLA_FFI_DataType_S64: case XLA_FFI_DataType_U64: case XLA_FFI_DataType_F64: n = 8; break;
    default: std::fprintf(stderr, "a dtype that is not known here\n"), std::abort();
  }
  for (int64_t i = 0; i < buffer.rank; ++i) n *= buffer.dims[i];
  return n;
}

static XLA_FFI_Error* OnCpu(XLA_FFI_Error* (*handler)(XLA_FFI_CallFrame*), XLA_FFI_CallFrame* frame) {
  if (frame->extension_start || frame->stage != XLA_FFI_ExecutionStage_EXECUTE) return handler(frame);
  const std::lock_guard<std::mutex> lock(mutex);
  XLA_FFI_Api api;
  std::memset(&api, 0, sizeof(api));
  std::memcpy(&api, frame->api, std::min(sizeof(api), frame->api->struct_size));
  api.XLA_FFI_Stream_Get = Stream;
  std::vector<XLA_FFI_Buffer> copies(frame->args.size + frame->rets.size);
  std::vector<void*> arguments, results;
  auto& buffers = ptx::TheState().buffers;
  const size_t before = buffers.size();
  for (size_t i = 0; i < copies.size(); ++i) {
    const bool result = int64_t(i) >= frame->args.size;
    copies[i] = *static_cast<XLA_FFI_Buffer*>(result ? frame->rets.rets[i - frame->args.size] : frame->args.args[i]);
    const uint64_t bytes = Bytes(copies[i]), address = NextAddress(bytes);
    const std::string name = (result ? "result " : "argument ") + std::to_string(result ? i - frame->args.size : i);
    auto* host = static_cast<uint8_t*>(copies[i].data);
    buffers.push_back({name, address, bytes, host, result, {}, {}});
    if (result) {
      std::memset(host, 0xff, bytes);  // not a number: whoever uses what was not written sees it
      buffers.back().written.resize(bytes);
      buffers.back().writer.resize(bytes);
    }
    copies[i].data = reinterpret_cast<void*>(address);
    (result ? results : arguments).push_back(&copies[i]);
  }
  XLA_FFI_CallFrame own = *frame;
  own.api = &api;
  own.args.args = arguments.data();
  own.rets.rets = results.data();
  XLA_FFI_Error* error = handler(&own);
  buffers.resize(before);
  return error;
}

#define X(name)                                                                            \
  extern "C" XLA_FFI_Error* name(XLA_FFI_CallFrame*);                                      \
  extern "C" XLA_FFI_Error* OnCpu_##name(XLA_FFI_CallFrame* frame) { return OnCpu(name, frame); }
HANDLERS
#undef X
