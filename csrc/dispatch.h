// What a kernel is asked to do, and the table of kernels that each instruction set fills.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace zo {

enum DType : int { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };
constexpr int DTYPES = 3;
enum Distributions : int { NORMAL = 0, RADEMACHER = 1 };
constexpr int DISTRIBUTIONS = 2;
inline int itemsize(int dtype) { return dtype == FLOAT32 ? 4 : 2; }

// One contiguous range of one tensor. src and dst point at element `begin` of the full parameter.
struct Job {
  const void* src;
  void* dst;
  uint64_t begin, end;  // element indices in the full parameter
  uint64_t seed;
  uint32_t stream;
  int directions;  // length of the two arrays below
  const uint32_t* direction;
  const float* scale;
  float src_scale;
  double* changes;  // null, or where the range's three change statistics go (changes.h)
};

using Kernel = void (*)(const Job&);

struct CombineRow {
  Kernel at[DTYPES][2];  // [dst dtype][stochastic]
};

struct Distribution {
  CombineRow combine[DTYPES];  // [src dtype]
  Kernel emit;                 // float32 z of one direction
};

struct Kernels {
  const char* isa;
  Distribution of[DISTRIBUTIONS];
  Kernel random_words;
};

// The tables this processor can run, fastest first; the last is always the scalar one.
const std::vector<const Kernels*>& available_kernels();

// The table of that name; throws std::invalid_argument naming the available ones.
const Kernels& kernels_named(const std::string& isa);

}  // namespace zo
