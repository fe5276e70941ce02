// Runs jobs on several threads.
#pragma once

#include <vector>

#include "dispatch.h"

namespace zo {

struct Task {
  Kernel kernel;
  Job job;  // change statistics are asked for in all jobs of a run or in none
  int src_itemsize, dst_itemsize;
};

// Cuts the tasks into pieces and runs them on `threads` threads (at least 1). Which thread runs a
// piece changes no bit of the result, and where it is cut none of what is written to dst. Each
// task's change statistics, where asked for, are the sums of its pieces' in order.
void run(const std::vector<Task>& tasks, int threads);

}  // namespace zo
