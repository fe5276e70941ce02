#include "parallel.h"

#include <algorithm>
#include <cstddef>

#include "ieee.h"

namespace zo {
namespace {

// Elements per piece: small enough to balance two threads over one layer, large enough that the
// set-up is lost in it, and a divisor of 2^34, where the high counter word changes.
constexpr uint64_t PIECE = uint64_t{1} << 16;

constexpr int STATISTICS = 3;  // of Job::changes

std::vector<Task> cut(const std::vector<Task>& tasks) {
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
  return pieces;
}

void run_pieces(const std::vector<Task>& pieces, int threads) {
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

}  // namespace

void run(const std::vector<Task>& tasks, int threads) {
  std::vector<Task> pieces = cut(tasks);
  if (std::none_of(tasks.begin(), tasks.end(), [](const Task& t) { return t.job.changes; })) {
    run_pieces(pieces, threads);
    return;
  }
  std::vector<double> partial(pieces.size() * STATISTICS);
  std::vector<double*> totals(pieces.size());
  for (size_t i = 0; i < pieces.size(); ++i) {
    totals[i] = pieces[i].job.changes;
    pieces[i].job.changes = &partial[i * STATISTICS];
  }
  run_pieces(pieces, threads);
  const IeeeArithmetic guard;
  for (const Task& task : tasks) std::fill_n(task.job.changes, STATISTICS, 0.0);
  for (size_t i = 0; i < pieces.size(); ++i)
    for (int k = 0; k < STATISTICS; ++k) totals[i][k] += partial[i * STATISTICS + k];
}

}  // namespace zo
