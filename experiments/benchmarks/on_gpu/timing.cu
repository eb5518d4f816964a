// Times of kernels without the host: CUDA events around replays of a graph of many calls. Built and called by timing.py.
//
// A custom call of XLA is timed from within: the function registered in its place captures many calls of it in a graph,
// each with group sizes of its own, so that no call finds its expert's bytes in a cache. cuBLAS, a copy and an empty
// kernel are timed the same way.

#include <cuda_runtime.h>
#include <dlfcn.h>

#include <cstdint>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

#include "xla/ffi/api/c_api.h"

namespace {

using Handler = XLA_FFI_Error* (*)(XLA_FFI_CallFrame*);

std::string failure;

void Check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

struct Memory {
  explicit Memory(size_t bytes) { Check(cudaMalloc(&data, bytes), "cudaMalloc"); }
  ~Memory() { cudaFree(data); }
  char* at(size_t offset) const { return static_cast<char*>(data) + offset; }
  void* data = nullptr;
};

// Microseconds of a call, of each replay of a graph of `calls` calls.
void Replay(int calls, int replays, float* microseconds, const std::function<void(cudaStream_t, int)>& call) {
  cudaStream_t stream;
  Check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "a stream");
  call(stream, 0);  // what is loaded at a first call isn't loaded during capture
  Check(cudaStreamSynchronize(stream), "a first call");
  Check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "capture");
  cudaGraph_t graph;
  try {
    for (int i = 0; i < calls; ++i) call(stream, i);
  } catch (...) {
    cudaStreamEndCapture(stream, &graph);
    throw;
  }
  Check(cudaStreamEndCapture(stream, &graph), "the end of capture");
  cudaGraphExec_t program;
  Check(cudaGraphInstantiate(&program, graph, 0), "a graph");
  cudaEvent_t before, after;
  Check(cudaEventCreate(&before), "an event");
  Check(cudaEventCreate(&after), "an event");
  for (int i = -2; i < replays; ++i) {  // the first two warm up
    Check(cudaEventRecord(before, stream), "an event");
    Check(cudaGraphLaunch(program, stream), "a replay");
    Check(cudaEventRecord(after, stream), "an event");
    Check(cudaStreamSynchronize(stream), "a replay");
    float milliseconds;
    Check(cudaEventElapsedTime(&milliseconds, before, after), "the time between events");
    if (i >= 0) microseconds[i] = 1000 * milliseconds / calls;
  }
  cudaEventDestroy(before);
  cudaEventDestroy(after);
  cudaGraphExecDestroy(program);
  cudaGraphDestroy(graph);
  cudaStreamDestroy(stream);
}

const char* Try(const std::function<void()>& f) {
  failure.clear();
  try {
    f();
  } catch (const std::exception& error) {
    failure = error.what();
  }
  return failure.c_str();
}

// Does next to nothing, but on what the kernel before it wrote: blocks, and one number.
__global__ void AddOne(int* number) {
  if (blockIdx.x == 0 && threadIdx.x == 0) ++*number;
}

// --- Custom calls ----------------------------------------------------------------------------------------------------

struct Timed {
  Handler handler = nullptr;
  int calls = 0;  // the last argument, group sizes, is int32 [calls * experts] instead of [experts]
  int replays = 0;
  float* microseconds = nullptr;
  cudaStream_t stream = nullptr;
} timed;

XLA_FFI_Error* OwnStream(XLA_FFI_Stream_Get_Args* arguments) {
  arguments->stream = timed.stream;
  return nullptr;
}

void TimeCalls(XLA_FFI_CallFrame* frame) {
  XLA_FFI_Stream_Get_Args get{};
  get.struct_size = XLA_FFI_Stream_Get_Args_STRUCT_SIZE;
  get.ctx = frame->ctx;
  if (frame->api->XLA_FFI_Stream_Get(&get)) throw std::runtime_error("XLA gives no stream");
  Check(cudaStreamSynchronize(static_cast<cudaStream_t>(get.stream)), "XLA's stream");

  XLA_FFI_Api api;
  std::memset(&api, 0, sizeof(api));
  std::memcpy(&api, frame->api, frame->api->struct_size < sizeof(api) ? frame->api->struct_size : sizeof(api));
  api.XLA_FFI_Stream_Get = OwnStream;
  std::vector<void*> arguments(frame->args.args, frame->args.args + frame->args.size);
  XLA_FFI_Buffer sizes = *static_cast<XLA_FFI_Buffer*>(arguments.back());
  if (sizes.rank != 1 || sizes.dims[0] % timed.calls) throw std::runtime_error("group sizes of another shape");
  int64_t experts = sizes.dims[0] / timed.calls;
  auto* first = static_cast<int32_t*>(sizes.data);
  sizes.dims = &experts;
  arguments.back() = &sizes;
  XLA_FFI_CallFrame own = *frame;
  own.api = &api;
  own.args.args = arguments.data();
  Replay(timed.calls, timed.replays, timed.microseconds, [&](cudaStream_t stream, int i) {
    timed.stream = stream;
    sizes.data = first + i * experts;
    if (timed.handler(&own)) throw std::runtime_error("the custom call fails");
  });
}

}  // namespace

extern "C" {

// What the next execution of `QmoeTimed` times.
void TimingSet(void* handler, int calls, int replays, float* microseconds) {
  timed = {reinterpret_cast<Handler>(handler), calls, replays, microseconds, nullptr};
  failure = "the custom call was not executed";
}

// Why there are no times; "" where there are.
const char* TimingFailure() { return failure.c_str(); }

// Registered in place of `timed.handler`; its result is that of the last call.
XLA_FFI_Error* QmoeTimed(XLA_FFI_CallFrame* frame) {
  if (frame->extension_start) {
    XLA_FFI_Error* error = timed.handler(frame);
    for (auto* e = frame->extension_start; e; e = e->next) {
      // It synchronizes: XLA must not capture it.
      if (e->type == XLA_FFI_Extension_Metadata) reinterpret_cast<XLA_FFI_Metadata_Extension*>(e)->metadata->traits = 0;
    }
    return error;
  }
  if (frame->stage != XLA_FFI_ExecutionStage_EXECUTE) return timed.handler(frame);
  Try([&] { TimeCalls(frame); });
  return nullptr;
}

// Kernels of so many blocks of 128 threads, each of which depends on the one before it.
const char* TimeEmpty(int blocks, int calls, int replays, float* microseconds) {
  return Try([&] {
    Memory number(sizeof(int));
    Check(cudaMemset(number.data, 0, sizeof(int)), "memory");
    Replay(calls, replays, microseconds, [&](cudaStream_t stream, int) {
      AddOne<<<blocks, 128, 0, stream>>>(static_cast<int*>(number.data));
      Check(cudaGetLastError(), "an empty kernel");
    });
  });
}

const char* TimeCopy(size_t bytes, int replays, float* microseconds) {
  return Try([&] {
    Memory from(bytes), to(bytes);
    Check(cudaMemset(from.data, 0, bytes), "memory");
    Replay(1, replays, microseconds, [&](cudaStream_t stream, int) {
      Check(cudaMemcpyAsync(to.data, from.data, bytes, cudaMemcpyDeviceToDevice, stream), "a copy");
    });
  });
}

// y [tokens, out] = x [tokens, width] W', bfloat16, float32 sums; W [out, width], or [width, out] if not `by_rows`.
// Each call meets `active` of `matrices` matrices, with tokens / active tokens each; the next call others.
const char* TimeGemm(const char* cublas, int64_t tokens, int64_t out, int64_t width, int64_t active, int64_t matrices,
                     int by_rows, int replays, float* microseconds) {
  return Try([&] {
    void* library = dlopen(cublas, RTLD_NOW | RTLD_LOCAL);
    if (!library) throw std::runtime_error(dlerror());
    auto symbol = [library](const char* name) {
      void* found = dlsym(library, name);
      if (!found) throw std::runtime_error(std::string("cuBLAS has no ") + name);
      return found;
    };
    auto check = [](int status, const char* what) {
      if (status) throw std::runtime_error(std::string(what) + ": cuBLAS status " + std::to_string(status));
    };
    const auto create = reinterpret_cast<int (*)(void**)>(symbol("cublasCreate_v2"));
    const auto destroy = reinterpret_cast<int (*)(void*)>(symbol("cublasDestroy_v2"));
    const auto set_stream = reinterpret_cast<int (*)(void*, cudaStream_t)>(symbol("cublasSetStream_v2"));
    const auto set_workspace = reinterpret_cast<int (*)(void*, void*, size_t)>(symbol("cublasSetWorkspace_v2"));
    using Gemm = int (*)(void*, int, int, int, int, int, const void*, const void*, int, int, const void*, int, int, const void*, void*, int, int, int, int);
    const auto gemm = reinterpret_cast<Gemm>(symbol("cublasGemmEx"));
    using Batched = int (*)(void*, int, int, int, int, int, const void*, const void* const*, int, int, const void* const*, int, int, const void*, void* const*, int, int, int, int, int);
    const auto batched = reinterpret_cast<Batched>(symbol("cublasGemmBatchedEx"));
    constexpr int kBfloat16 = 14, kFloat32Sums = 68, kDefault = -1, kNot = 0, kTransposed = 1;

    const size_t matrix = size_t(out) * width * 2, each = tokens / active, workspace = 32 << 20;
    Memory W(matrices * matrix), x(tokens * width * 2), y(tokens * out * 2), scratch(workspace);
    Check(cudaMemset(W.data, 0x3c, matrices * matrix), "memory");
    Check(cudaMemset(x.data, 0x3c, tokens * width * 2), "memory");
    const int calls = static_cast<int>(matrices / active);
    std::vector<void*> pointers;  // of all calls: matrices, tokens, results
    for (int64_t i = 0; i < int64_t(calls) * active; ++i) pointers.push_back(W.at(i * matrix));
    for (int64_t k = 0; k < active; ++k) pointers.push_back(x.at(k * each * width * 2));
    for (int64_t k = 0; k < active; ++k) pointers.push_back(y.at(k * each * out * 2));
    Memory on_device(pointers.size() * sizeof(void*));
    Check(cudaMemcpy(on_device.data, pointers.data(), pointers.size() * sizeof(void*), cudaMemcpyHostToDevice), "pointers");
    void** table = static_cast<void**>(on_device.data);
    const int64_t behind = int64_t(calls) * active;

    void* handle;
    check(create(&handle), "cublasCreate");
    check(set_workspace(handle, scratch.data, workspace), "cublasSetWorkspace");
    const float one = 1, zero = 0;
    const int m = static_cast<int>(out), k = static_cast<int>(width), n = static_cast<int>(each);
    const int transposed = by_rows ? kTransposed : kNot, stride = by_rows ? k : m;
    Replay(calls, replays, microseconds, [&](cudaStream_t stream, int i) {
      check(set_stream(handle, stream), "cublasSetStream");
      if (active == 1) {
        check(gemm(handle, transposed, kNot, m, n, k, &one, W.at(i * matrix), kBfloat16, stride, x.data, kBfloat16, k,
                   &zero, y.data, kBfloat16, m, kFloat32Sums, kDefault), "cublasGemmEx");
      } else {
        check(batched(handle, transposed, kNot, m, n, k, &one, table + i * active, kBfloat16, stride, table + behind,
                      kBfloat16, k, &zero, table + behind + active, kBfloat16, m, static_cast<int>(active),
                      kFloat32Sums, kDefault), "cublasGemmBatchedEx");
      }
    });
    destroy(handle);
  });
}

}  // extern "C"
