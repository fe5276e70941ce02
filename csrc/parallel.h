// Runs jobs on several threads.
#pragma once

#include <vector>

#include "dispatch.h"

namespace zo {

struct Task {
  Kernel kernel;
  Job job;
  int src_itemsize, dst_itemsize;
};

// Cuts the tasks into pieces and runs them on `threads` threads (at least 1). Which thread runs a
// piece, and where it is cut, changes no bit of the result.
void run(const std::vector<Task>& tasks, int threads);

}  // namespace zo
