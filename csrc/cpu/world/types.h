// The operations and element types of the engine, as numbers that ranks exchange and as names.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "core/pack.h"
#include "core/world.h"

namespace pyparallel::cpu {

enum class Operation : uint32_t {
  barrier = 1,
  all_reduce,
  reduce_scatter,
  all_gather,
  all_to_all,
  broadcast,
  message,
  exchange,
  window,
};

enum class Reduction : uint32_t { none = 0, sum, max, min };

// The order is that of pyparallel/comm/shared/host_tensors.py, whose numbers are sent.
enum class DType : uint32_t {
  uint8 = 0,
  int8,
  boolean,
  int16,
  int32,
  int64,
  float16,
  bfloat16,
  float32,
  float64,
  complex64,
  complex128,
  float8_e4m3fn,
  float8_e5m2,
  uint16,
  uint32,
  uint64,
};
constexpr uint32_t kDTypeCount = 17;

inline const char* name_of(Operation operation) {
  static constexpr const char* kNames[] = {
      "nothing",    "barrier",   "all_reduce", "reduce_scatter", "all_gather",
      "all_to_all", "broadcast", "message",    "exchange",       "window"};
  return uint32_t(operation) < 10 ? kNames[uint32_t(operation)] : "an unknown call";
}

inline const char* name_of(Reduction reduction) {
  static constexpr const char* kNames[] = {"", "sum", "max", "min"};
  return uint32_t(reduction) < 4 ? kNames[uint32_t(reduction)] : "?";
}

inline const char* name_of(DType dtype) {
  static constexpr const char* kNames[kDTypeCount] = {
      "uint8",         "int8",        "bool",    "int16",   "int32",     "int64",
      "float16",       "bfloat16",    "float32", "float64", "complex64", "complex128",
      "float8_e4m3fn", "float8_e5m2", "uint16",  "uint32",  "uint64"};
  return uint32_t(dtype) < kDTypeCount ? kNames[uint32_t(dtype)] : "?";
}

inline int64_t size_of(DType dtype) {
  static constexpr int kSizes[kDTypeCount] = {1, 1, 1, 2, 4, 8, 2, 2, 4, 8, 8, 16, 1, 1, 2, 4, 8};
  return kSizes[uint32_t(dtype)];
}

// Calls visit(T{}) with the element type of `dtype`, where a reduction over it is defined.
template <class Visit>
void visit_reducible(DType dtype, Visit visit) {
  switch (dtype) {
    case DType::float32: return visit(float{});
    case DType::float64: return visit(double{});
    case DType::float16: return visit(Half{});
    case DType::bfloat16: return visit(BFloat16{});
    case DType::int32: return visit(int32_t{});
    case DType::int64: return visit(int64_t{});
    default:
      throw std::invalid_argument(
          "dtype: expected float32, float16, bfloat16, float64, int32 or int64 for a reduction, "
          "got " +
          std::string(name_of(dtype)) + "; convert first, or gather and reduce locally");
  }
}

inline std::string to_string(const Description& d) {
  const auto operation = Operation(d.operation);
  std::string text = name_of(operation);
  if (operation == Operation::barrier) return text;
  if (operation == Operation::message) {
    text += " tag " + std::to_string(d.root);
  } else if (operation == Operation::broadcast) {
    text += " from rank " + std::to_string(d.root);
  } else if (d.reduction != 0) {
    text += std::string(" ") + name_of(Reduction(d.reduction));
  }
  text += " of " + std::string(name_of(DType(d.dtype))) + "[" + std::to_string(d.count) + "]";
  return text;
}

}  // namespace pyparallel::cpu
