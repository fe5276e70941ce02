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
// Elements per piece: small enough to balance two threads over one layer, large enough that the
// set-up is lost in it, and a divisor of 2^34, where the high counter word changes.
constexpr uint64_t PIECE = uint64_t{1} << 16;
inline int itemsize(int dtype) { return dtype == FLOAT32 ? 4 : 2; }

class Exceptions;

// One contiguous range of one tensor, which crosses no multiple of PIECE. src, dst and other point
// at element `begin` of the full parameter.
struct Job {
  const void* src = nullptr;
  void* dst = nullptr;
  void* other = nullptr;        // pair: the minus point; advance: the residuals
  uint64_t begin = 0, end = 0;  // element indices in the full parameter
  uint64_t seed = 0;
  uint32_t stream = 0;
  int directions = 1;  // length of the two arrays below
  const uint32_t* direction = nullptr;
  const float* scale = nullptr;
  float src_scale = 1.0f;
  double* changes = nullptr;  // null, or where the range's three change statistics go (changes.h)

  // advance: updates, the number of directions of each and its factor of the weights.
  int updates = 0;
  const int* lengths = nullptr;
  const float* src_scales = nullptr;

  // swap: what gives the weights back from what memory holds, before and after.
  Exceptions *held = nullptr, *kept = nullptr;
  float held_scale = 0.0f;
};

using Kernel = void (*)(const Job&);

enum Roundings : int { NEAREST = 0, STOCHASTIC = 1, RESIDUAL = 2 };
constexpr int ROUNDINGS = 3;
enum Swaps : int { HOLD = 0, SWAP = 1, RELEASE = 2, RELEASE_STOCHASTIC = 3 };
constexpr int SWAPS = 4;

struct CombineRow {
  Kernel at[DTYPES][2];  // [dst dtype][stochastic]
};

struct Distribution {
  CombineRow combine[DTYPES];  // [src dtype]
  Kernel pair[DTYPES];
  Kernel advance[DTYPES][ROUNDINGS];
  Kernel swap[DTYPES][SWAPS];
  Kernel emit;  // float32 z of one direction
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
