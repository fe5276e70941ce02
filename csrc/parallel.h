// Runs jobs on several threads.
#pragma once

#include <vector>

#include "dispatch.h"
#include "exceptions.h"

namespace zo {

struct Task {
  Kernel kernel;
  Job job;  // change statistics are asked for in all jobs of a run or in none
  int src_itemsize, dst_itemsize, other_itemsize = 0;
};

// Cuts the tasks into pieces and runs them on `threads` threads (at least 1). Which thread runs a
// piece changes no bit of the result, and where it is cut none of what is written to dst. Each
// task's change statistics, where asked for, are the sums of its pieces' in order.
void run(const std::vector<Task>& tasks, int threads);

// The same for swaps: each piece is given its exceptions of an earlier run over the same tasks
// (null: there was none), which are let go of, and those that it leaves (null: none).
void run_swap(const std::vector<Task>& tasks, int threads, Store* held, Store* kept);

// Fake quantisation of a tensor, or with no dst the ends of its groups; returns those of all.
Extremes run_fake_quant(QuantKernel kernel, const QuantJob& whole, int itemsize, int threads);

// The same of what a task writes, its dst and whole.src being one: block by block, while a cache
// has it, or for groups longer than a piece in two walks.
Extremes run_perturb_quant(const Task& perturb, QuantKernel kernel, const QuantJob& whole,
                           int threads);

}  // namespace zo
