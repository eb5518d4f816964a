// Runs the CPU kernels outside of JAX, so that sanitizers see every byte: arrays are allocated each by itself.
//
//   sanitized CASES RESULTS ISA REPETITIONS
//
// CASES holds calls, RESULTS gets what they give; test_sanitized.py writes and reads them. Then every call is repeated
// with arrays of noise, as many times: those may give anything, but touch nothing else.

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "xla/ffi/api/c_api.h"

extern "C" XLA_FFI_Error* QmoeGapDot(XLA_FFI_CallFrame*);
extern "C" XLA_FFI_Error* QmoeDictionaryDot(XLA_FFI_CallFrame*);
extern "C" XLA_FFI_Error* QmoeNibblesDot(XLA_FFI_CallFrame*);
extern "C" void QmoeSetDictionary(const uint64_t*);
extern "C" void QmoeSetGapCodes(int64_t, int64_t, const uint8_t*, const uint32_t*);
extern "C" bool QmoeHasInstructionSet(const char*);

namespace {

// What XLA offers a custom call: errors, and a pool of threads, whose tasks run each on a thread of its own. A new
// thread has buffers that are as large as its task needs, and no larger.
std::string last_error;
std::vector<std::thread> threads;
std::mutex mutex;

XLA_FFI_Error* CreateError(XLA_FFI_Error_Create_Args* args) {
  last_error = args->message;
  return reinterpret_cast<XLA_FFI_Error*>(&last_error);
}
void DestroyError(XLA_FFI_Error_Destroy_Args*) {}
XLA_FFI_Error* Schedule(XLA_FFI_ThreadPool_Schedule_Args* args) {
  const std::lock_guard<std::mutex> lock(mutex);
  threads.emplace_back(args->task, args->data);
  return nullptr;
}
XLA_FFI_Error* NumThreads(XLA_FFI_ThreadPool_NumThreads_Args* args) {
  *args->num_threads = 2;
  return nullptr;
}

XLA_FFI_Api Api() {
  XLA_FFI_Api api = {};
  api.struct_size = XLA_FFI_Api_STRUCT_SIZE;
  api.api_version.struct_size = XLA_FFI_Api_Version_STRUCT_SIZE;
  api.api_version.major_version = XLA_FFI_API_MAJOR;
  api.api_version.minor_version = XLA_FFI_API_MINOR;
  api.XLA_FFI_Error_Create = CreateError;
  api.XLA_FFI_Error_Destroy = DestroyError;
  api.XLA_FFI_ThreadPool_Schedule = Schedule;
  api.XLA_FFI_ThreadPool_NumThreads = NumThreads;
  return api;
}

struct Array {
  XLA_FFI_DataType dtype;
  std::vector<int64_t> dims;
  std::unique_ptr<uint8_t[]> data;
  int64_t bytes;

  XLA_FFI_Buffer Buffer() {
    return {XLA_FFI_Buffer_STRUCT_SIZE, nullptr, dtype, data.get(), static_cast<int64_t>(dims.size()), dims.data()};
  }
};

struct Case {
  int64_t codec;  // 0: dictionary, 1: gap, 2: nibbles
  std::vector<Array> arguments, results;
};

// Calls the handler on a new thread. Returns false for a refused call.
bool Run(Case& c, const XLA_FFI_Api& api, std::string_view isa) {
  std::vector<XLA_FFI_Buffer> buffers;
  for (Array& a : c.arguments) buffers.push_back(a.Buffer());
  for (Array& a : c.results) buffers.push_back(a.Buffer());
  std::vector<void*> args, rets;
  for (size_t i = 0; i < buffers.size(); ++i) (i < c.arguments.size() ? args : rets).push_back(&buffers[i]);
  std::vector<XLA_FFI_ArgType> arg_types(args.size(), XLA_FFI_ArgType_BUFFER);
  std::vector<XLA_FFI_RetType> ret_types(rets.size(), XLA_FFI_RetType_BUFFER);

  XLA_FFI_ByteSpan name = {"isa", 3}, value = {isa.data(), isa.size()};
  XLA_FFI_ByteSpan* names[] = {&name};
  void* attrs[] = {&value};
  XLA_FFI_AttrType attr_types[] = {XLA_FFI_AttrType_STRING};

  XLA_FFI_CallFrame frame = {};
  frame.struct_size = XLA_FFI_CallFrame_STRUCT_SIZE;
  frame.api = &api;
  frame.stage = XLA_FFI_ExecutionStage_EXECUTE;
  frame.args = {XLA_FFI_Args_STRUCT_SIZE, nullptr, static_cast<int64_t>(args.size()), arg_types.data(), args.data()};
  frame.rets = {XLA_FFI_Rets_STRUCT_SIZE, nullptr, static_cast<int64_t>(rets.size()), ret_types.data(), rets.data()};
  frame.attrs = {XLA_FFI_Attrs_STRUCT_SIZE, nullptr, 1, attr_types, names, attrs};
  XLA_FFI_Error* error = nullptr;
  std::thread([&] { error = (c.codec == 0 ? QmoeDictionaryDot : c.codec == 1 ? QmoeGapDot : QmoeNibblesDot)(&frame); }).join();
  for (std::thread& thread : threads) thread.join();
  threads.clear();
  return error == nullptr;
}

int64_t ReadNumber(FILE* file) {
  int64_t number;
  if (std::fread(&number, sizeof(number), 1, file) != 1) std::exit(3);
  return number;
}

Array ReadArray(FILE* file, bool is_result) {
  Array array;
  array.dtype = static_cast<XLA_FFI_DataType>(ReadNumber(file));
  array.dims.resize(ReadNumber(file));
  for (int64_t& dim : array.dims) dim = ReadNumber(file);
  array.bytes = ReadNumber(file);
  array.data.reset(new uint8_t[array.bytes]);
  if (is_result) {
    std::memset(array.data.get(), 0xff, array.bytes);
  } else if (array.bytes > 0 && std::fread(array.data.get(), array.bytes, 1, file) != 1) {
    std::exit(3);
  }
  return array;
}

}  // namespace

int main(int, char** argv) {
  FILE* file = std::fopen(argv[1], "rb");
  FILE* out = std::fopen(argv[2], "wb");
  const std::string_view isa = argv[3];
  if (!QmoeHasInstructionSet(argv[3])) return 4;
  const XLA_FFI_Api api = Api();
  std::vector<uint64_t> dictionary(65'536);
  if (std::fread(dictionary.data(), 8, dictionary.size(), file) != dictionary.size()) return 3;
  QmoeSetDictionary(dictionary.data());
  for (int64_t left = ReadNumber(file); left > 0; --left) {
    const int64_t levels = ReadNumber(file), count = ReadNumber(file);
    std::vector<uint8_t> numbers(count);
    std::vector<uint32_t> windows(count << 12);
    if (std::fread(numbers.data(), 1, numbers.size(), file) != numbers.size()) return 3;
    if (std::fread(windows.data(), 4, windows.size(), file) != windows.size()) return 3;
    QmoeSetGapCodes(levels, count, numbers.data(), windows.data());
  }

  std::mt19937_64 random(0);
  for (int64_t left = ReadNumber(file); left > 0; --left) {
    Case c;
    c.codec = ReadNumber(file);
    const int64_t arguments = ReadNumber(file);
    for (int64_t i = 0; i < arguments; ++i) c.arguments.push_back(ReadArray(file, false));
    for (int i = 0; i < 2; ++i) c.results.push_back(ReadArray(file, true));
    if (!Run(c, api, isa)) {
      std::fprintf(stderr, "refused: %s\n", last_error.c_str());
      return 5;
    }
    std::fwrite(c.results[0].data.get(), 1, c.results[0].bytes, out);

    // Noise in the codec's own arrays, in levels and in sizes: in one of them, in all, or in a few bytes.
    const auto sound = [&] {
      std::vector<std::vector<uint8_t>> copies;
      for (const Array& a : c.arguments) copies.emplace_back(a.data.get(), a.data.get() + a.bytes);
      return copies;
    }();
    for (int64_t repetition = std::atoll(argv[4]); repetition > 0; --repetition) {
      const uint64_t which = random() % (arguments + 1);
      for (int64_t i = 1; i < arguments; ++i) {
        Array& array = c.arguments[i];
        if (!sound[i].empty()) std::memcpy(array.data.get(), sound[i].data(), array.bytes);
        if (which != static_cast<uint64_t>(i) && which != 0) continue;
        const bool few = random() % 2 == 0;
        for (int64_t b = 0; b < array.bytes; ++b) {
          if (!few || random() % 16 == 0) array.data[b] = static_cast<uint8_t>(random() >> (random() % 8));
        }
      }
      Run(c, api, isa);
    }
  }
  std::fclose(out);
  return 0;
}
