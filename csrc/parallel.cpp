#include "parallel.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <stdexcept>

#include "ieee.h"

namespace zo {
namespace {

constexpr int STATISTICS = 3;  // of Job::changes
// Elements that are perturbed and then quantised while the first- or second-level cache has them:
// a multiple of what a pass over Rademacher signs draws at once.
constexpr uint64_t BLOCK = 16384;

// The task on elements at .. end - 1 of the full parameter, or fewer: up to a multiple of PIECE.
Task piece_of(const Task& task, uint64_t at, uint64_t end) {
  Task piece = task;
  const std::ptrdiff_t done = static_cast<std::ptrdiff_t>(at - task.job.begin);
  piece.job.begin = at;
  piece.job.end = std::min((at / PIECE + 1) * PIECE, end);
  if (task.job.src)
    piece.job.src = static_cast<const char*>(task.job.src) + done * task.src_itemsize;
  piece.job.dst = static_cast<char*>(task.job.dst) + done * task.dst_itemsize;
  if (task.job.other)
    piece.job.other = static_cast<char*>(task.job.other) + done * task.other_itemsize;
  return piece;
}

std::vector<Task> cut(const std::vector<Task>& tasks) {
  std::vector<Task> pieces;
  for (const Task& task : tasks)
    for (uint64_t at = task.job.begin; at < task.job.end; at = pieces.back().job.end)
      pieces.push_back(piece_of(task, at, task.job.end));
  return pieces;
}

// The task on `count` elements from its own number `first` on, here and now.
void run_range(const Task& task, uint64_t first, uint64_t count) {
  const uint64_t end = task.job.begin + first + count;
  for (uint64_t at = task.job.begin + first; at < end;) {
    const Task piece = piece_of(task, at, end);
    piece.kernel(piece.job);
    at = piece.job.end;
  }
}

template <class Work>
void for_each(size_t number, int threads, const Work& work) {
  const std::ptrdiff_t count = static_cast<std::ptrdiff_t>(number);
  const int used = static_cast<int>(std::min<std::ptrdiff_t>(std::max(threads, 1), count));
  if (used <= 1) {
    const IeeeArithmetic guard;
    for (std::ptrdiff_t i = 0; i < count; ++i) work(i);
    return;
  }
#pragma omp parallel num_threads(used)
  {
    const IeeeArithmetic guard;
#pragma omp for schedule(dynamic)
    for (std::ptrdiff_t i = 0; i < count; ++i) work(i);
  }
}

void run_pieces(const std::vector<Task>& pieces, int threads) {
  for_each(pieces.size(), threads, [&](size_t i) { pieces[i].kernel(pieces[i].job); });
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

// The ends of what a and b are the ends of; NaN wins.
Extremes joined(const Extremes& a, const Extremes& b) {
  const auto choose = [](float x, float y, bool first) {
    return std::isnan(x) || (first && !std::isnan(y)) ? x : y;
  };
  return {choose(a.low, b.low, a.low < b.low), choose(a.high, b.high, a.high > b.high)};
}

// `count` groups from the one numbered `first` on.
QuantJob groups_of(const QuantJob& whole, uint64_t first, uint64_t count, int itemsize) {
  QuantJob part = whole;
  const uint64_t bytes = first * whole.group * itemsize;
  part.src = static_cast<const char*>(whole.src) + bytes;
  if (whole.dst) part.dst = static_cast<char*>(whole.dst) + bytes;
  part.groups = count;
  if (whole.scales) part.scales += first;
  if (whole.lows) part.lows += first, part.highs += first;
  return part;
}

// The groups in parts of up to `elements`, or of one group.
std::vector<QuantJob> parts_of(const QuantJob& whole, uint64_t elements, int itemsize) {
  const uint64_t count = std::max<uint64_t>(elements / whole.group, 1);
  std::vector<QuantJob> parts;
  for (uint64_t first = 0; first < whole.groups; first += count)
    parts.push_back(groups_of(whole, first, std::min(count, whole.groups - first), itemsize));
  return parts;
}

Extremes run_parts(QuantKernel kernel, const std::vector<QuantJob>& parts, int threads) {
  std::vector<Extremes> found(parts.size());
  for_each(parts.size(), threads, [&](size_t i) { found[i] = kernel(parts[i]); });
  Extremes all;
  for (const Extremes& part : found) all = joined(all, part);
  return all;
}

// Groups longer than a piece: the ends of all pieces first, then their elements. prepare(first,
// count) comes before the first read of elements first .. first + count - 1.
template <class Prepare>
Extremes run_long_groups(QuantKernel kernel, const QuantJob& whole, int itemsize, int threads,
                         const Prepare& prepare) {
  const uint64_t pieces = (whole.group + PIECE - 1) / PIECE;
  std::vector<QuantJob> parts;
  for (uint64_t g = 0; g < whole.groups; ++g) {
    for (uint64_t at = 0; at < whole.group; at += PIECE) {
      QuantJob part = groups_of(whole, g, 1, itemsize);
      part.src = static_cast<const char*>(part.src) + at * itemsize;
      if (part.dst) part.dst = static_cast<char*>(part.dst) + at * itemsize;
      part.group = std::min(PIECE, whole.group - at);
      parts.push_back(part);
    }
  }
  std::vector<Extremes> found(parts.size()), ends(whole.groups);
  for_each(parts.size(), threads, [&](size_t i) {
    QuantJob part = parts[i];
    prepare(i / pieces * whole.group + i % pieces * PIECE, part.group);
    part.dst = nullptr;
    part.lows = part.highs = nullptr;
    found[i] = kernel(part);
  });
  Extremes all;
  for (size_t i = 0; i < found.size(); ++i) {
    ends[i / pieces] = joined(ends[i / pieces], found[i]);
    all = joined(all, found[i]);
  }
  for (uint64_t g = 0; g < whole.groups && !whole.dst && whole.lows; ++g) {
    whole.lows[g] = ends[g].low;
    whole.highs[g] = ends[g].high;
  }
  if (!whole.dst) return all;
  for (size_t i = 0; i < parts.size(); ++i) {
    parts[i].lows = &ends[i / pieces].low;
    parts[i].highs = &ends[i / pieces].high;
  }
  run_parts(kernel, parts, threads);
  return all;
}

}  // namespace

Extremes run_fake_quant(QuantKernel kernel, const QuantJob& whole, int itemsize, int threads) {
  if (whole.group > PIECE)
    return run_long_groups(kernel, whole, itemsize, threads, [](uint64_t, uint64_t) {});
  return run_parts(kernel, parts_of(whole, PIECE, itemsize), threads);
}

Extremes run_perturb_quant(const Task& perturb, QuantKernel kernel, const QuantJob& whole,
                           int threads) {
  const int itemsize = perturb.dst_itemsize;
  if (whole.group > PIECE)
    return run_long_groups(kernel, whole, itemsize, threads, [&](uint64_t first, uint64_t count) {
      run_range(perturb, first, count);
    });
  const std::vector<QuantJob> parts = parts_of(whole, PIECE, itemsize);
  std::vector<Extremes> found(parts.size());
  const uint64_t step = parts.empty() ? 0 : parts[0].groups * whole.group;
  for_each(parts.size(), threads, [&](size_t i) {
    uint64_t first = i * step;
    for (const QuantJob& block : parts_of(parts[i], BLOCK, itemsize)) {
      run_range(perturb, first, block.groups * block.group);
      found[i] = joined(found[i], kernel(block));
      first += block.groups * block.group;
    }
  });
  Extremes all;
  for (const Extremes& part : found) all = joined(all, part);
  return all;
}

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
