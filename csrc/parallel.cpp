#include "parallel.h"

#include <algorithm>
#include <cstddef>

#include "ieee.h"

namespace zo {
namespace {

// Elements per piece: small enough to balance two threads over one layer, large enough that the
// set-up is lost in it, and a divisor of 2^34, where the high counter word changes.
constexpr uint64_t PIECE = uint64_t{1} << 16;

}  // namespace

void run(const std::vector<Task>& tasks, int threads) {
  std::vector<Task> pieces;
  for (const Task& task : tasks) {
    uint64_t at = task.job.begin;
    while (at < task.job.end) {
      Task piece = task;
      const uint64_t cut = (at / PIECE + 1) * PIECE;
      const std::ptrdiff_t done = static_cast<std::ptrdiff_t>(at - task.job.begin);
      piece.job.begin = at;
      piece.job.end = at = std::min(cut, task.job.end);
      if (task.job.src)
        piece.job.src = static_cast<const char*>(task.job.src) + done * task.src_itemsize;
      piece.job.dst = static_cast<char*>(task.job.dst) + done * task.dst_itemsize;
      pieces.push_back(piece);
    }
  }
  const std::ptrdiff_t count = static_cast<std::ptrdiff_t>(pieces.size());
  const int used = static_cast<int>(std::min<std::ptrdiff_t>(std::max(threads, 1), count));
  if (used <= 1) {
    const IeeeArithmetic guard;
    for (const Task& piece : pieces) piece.kernel(piece.job);
    return;
  }
#pragma omp parallel num_threads(used)
  {
    const IeeeArithmetic guard;
#pragma omp for schedule(dynamic)
    for (std::ptrdiff_t i = 0; i < count; ++i) pieces[i].kernel(pieces[i].job);
  }
}

}  // namespace zo
