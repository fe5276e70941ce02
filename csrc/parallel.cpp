#include "parallel.h"

#include <algorithm>
#include <cstddef>
#include <stdexcept>

#include "ieee.h"

namespace zo {
namespace {

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
      if (task.job.other)
        piece.job.other = static_cast<char*>(task.job.other) + done * task.other_itemsize;
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

// Runs the pieces of tasks, and sums the change statistics that are asked for.
void run_and_sum(const std::vector<Task>& tasks, std::vector<Task>& pieces, int threads) {
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

}  // namespace

void run(const std::vector<Task>& tasks, int threads) {
  std::vector<Task> pieces = cut(tasks);
  run_and_sum(tasks, pieces, threads);
}

void run_swap(const std::vector<Task>& tasks, int threads, Store* held, Store* kept) {
  std::vector<Task> pieces = cut(tasks);
  if (held && held->pieces.size() != pieces.size())
    throw std::invalid_argument("swap: the store is of other tensors");
  if (kept) kept->pieces.resize(pieces.size());
  for (size_t i = 0; i < pieces.size(); ++i) {
    if (held) pieces[i].job.held = &held->pieces[i];
    if (kept) pieces[i].job.kept = &kept->pieces[i];
  }
  run_and_sum(tasks, pieces, threads);
}

}  // namespace zo
