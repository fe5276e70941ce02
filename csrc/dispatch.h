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

enum Formats : int { INT_SYMMETRIC = 0, INT_ASYMMETRIC = 1, FLOAT = 2, NF4 = 3 };
constexpr int FORMATS = 4;

// Fake quantisation of consecutive groups of one tensor. The ends of a group are its least and its
// greatest element, 0 included; of symmetric formats 0 and the greatest magnitude.
struct QuantJob {
  const void* src = nullptr;
  void* dst = nullptr;             // may be src; null: find the ends only
  uint64_t groups = 0, group = 0;  // how many, and the elements of each
  float top = 1.0f;                // what a group's extent is divided by to give its scale
  // FLOAT: stored mantissa bits, exponent of the least normal value, and whether the scale is the
  // power of two of OCP MX instead.
  int mantissa = 0, min_exponent = 0;
  bool power_of_two = false;
  const float* scales = nullptr;            // null, or of each group instead of its own
  float *lows = nullptr, *highs = nullptr;  // null, or the ends of each: known, or to be found
};

struct Extremes {
  float low = 0.0f, high = 0.0f;
};

// Returns the ends of all groups; NaN if there is one. Not looked for where `lows` are known.
using QuantKernel = Extremes (*)(const QuantJob&);

struct QuantRow {
  QuantKernel of[FORMATS];
};

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
  QuantRow fake_quant[DTYPES];
};

// The tables this processor can run, fastest first; the last is always the scalar one.
const std::vector<const Kernels*>& available_kernels();

// The table of that name; throws std::invalid_argument naming the available ones.
const Kernels& kernels_named(const std::string& isa);

}  // namespace zo
