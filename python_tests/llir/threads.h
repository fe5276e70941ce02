// Threads, warps and blocks of a kernel that translate.py has translated.
//
// A kernel without warp and block operations runs one thread after another. One with them runs its
// threads as fibers. What an operation of a warp does (shuffle, redux, ldmatrix) its last thread to
// arrive does for all. A warp runs until it needs another one, the lowest or the highest first, so
// that a missing barrier shows in the results of one of the two orders.
#pragma once

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cstdint>
#include <cstring>

namespace {

constexpr int kWarp = 32, kMaxThreads = 1024;
constexpr size_t kStack = 256 << 10, kGuard = 4096;
// Below 2^32, because pointers to shared memory have 32 bits; functions.py has the same number.
constexpr uint64_t kShared = 0x20000000, kSharedMost = 256 << 10;
constexpr int kAnywhere = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;

enum Kind { kOutOfBounds = 1, kMisaligned, kDivergence, kDeadlock, kUnsupported, kNoMemory };
enum Wait { kNothing, kForOthers, kDone };

// Where the last access of one load or store fell: `limit` is the first offset from `base` at which
// it would reach past the end, 0 before its first one.
struct Site {
  uint64_t base, limit;
};

struct Range {
  uint64_t base, bytes;
};

// Launch and Fault are mirrored by run_llir.py.
struct Launch {
  void (*entry)(const uint64_t* arguments);
  const uint64_t* arguments;
  Site* sites;
  const Range* ranges;
  int64_t site_count, range_count, grid[3];
  int32_t threads, cooperative, backwards, shared_bytes;
};

struct Fault {
  int32_t kind, site, thread, width;
  int64_t program[3];
  uint64_t address;
};

struct Fiber {
  ucontext_t start;
  jmp_buf at;
  bool started;
  Wait wait;
  int site;
};

// What the lanes of a warp bring to an operation and take from it.
struct Warp {
  int arrived, site;
  uint64_t in[kWarp][5], out[kWarp][4];
};

Launch launch;
Fault fault;
Fiber fibers[kMaxThreads];
Warp warps[kMaxThreads / kWarp];
int block_arrived, block_site;
jmp_buf scheduler, end_of_run;
void* stacks;

}  // namespace

extern "C" {

int32_t llir_sreg_tid_x, llir_sreg_ntid_x;
int32_t llir_sreg_ctaid_x, llir_sreg_ctaid_y, llir_sreg_ctaid_z;
int32_t llir_sreg_nctaid_x, llir_sreg_nctaid_y, llir_sreg_nctaid_z;
int32_t llir_sreg_laneid, llir_sreg_warpid;

}  // extern "C"

namespace {

[[noreturn]] void stop(Kind kind, int site, uint64_t address = 0, int width = 0) {
  const int64_t x = llir_sreg_ctaid_x, y = llir_sreg_ctaid_y, z = llir_sreg_ctaid_z;
  fault = {kind, site, llir_sreg_tid_x, width, {x, y, z}, address};
  _longjmp(end_of_run, 1);
}

void become(int thread) {
  llir_sreg_tid_x = thread;
  llir_sreg_laneid = thread % kWarp;
  llir_sreg_warpid = thread / kWarp;
}

void fiber_main() {
  for (;;) {
    launch.entry(launch.arguments);
    Fiber& self = fibers[llir_sreg_tid_x];
    self.wait = kDone;
    if (!_setjmp(self.at)) _longjmp(scheduler, 1);
  }
}

void resume(int thread) {
  Fiber& fiber = fibers[thread];
  become(thread);
  if (_setjmp(scheduler)) return;
  if (fiber.started) _longjmp(fiber.at, 1);
  fiber.started = true;
  setcontext(&fiber.start);
}

void wait_here(int site) {
  Fiber& self = fibers[llir_sreg_tid_x];
  self.wait = kForOthers;
  self.site = site;
  if (!_setjmp(self.at)) _longjmp(scheduler, 1);
}

// All lanes of a warp as far as they get; how many came to their ends, or -1 if none could move.
int run_warp(int first) {
  int done = 0;
  bool moved = false;
  for (bool again = true; again;) {
    again = false;
    for (int i = 0; i < kWarp; ++i) {
      const int thread = first + (launch.backwards ? kWarp - 1 - i : i);
      if (fibers[thread].wait != kNothing) continue;
      resume(thread);
      done += fibers[thread].wait == kDone;
      again = moved = true;
    }
  }
  return moved ? done : -1;
}

// All threads of a program, as fibers, to their ends. A warp goes on until it needs another one.
void run_together() {
  for (int thread = 0; thread < launch.threads; ++thread) fibers[thread].wait = kNothing;
  for (int done = 0; done < launch.threads;) {
    bool moved = false;
    for (int i = 0; i < launch.threads; i += kWarp) {
      const int ended = run_warp(launch.backwards ? launch.threads - kWarp - i : i);
      moved |= ended >= 0;
      done += ended > 0 ? ended : 0;
    }
    if (moved) continue;
    int stuck = 0;
    while (fibers[stuck].wait != kForOthers) ++stuck;
    become(stuck);
    stop(kDeadlock, fibers[stuck].site);
  }
}

// The caller waits until all lanes of its warp are here; the last one runs whole(warp) first.
template <typename Whole>
const Warp& together(uint32_t mask, int site, Whole whole) {
  Warp& warp = warps[llir_sreg_warpid];
  if (mask != 0xffffffff) stop(kUnsupported, site, mask);
  if (warp.arrived && warp.site != site) stop(kDivergence, site);
  warp.site = site;
  if (++warp.arrived < kWarp) {
    wait_here(site);
  } else {
    warp.arrived = 0;
    whole(warp);
    Fiber* first = &fibers[llir_sreg_warpid * kWarp];
    for (int lane = 0; lane < kWarp; ++lane) first[lane].wait = kNothing;
  }
  return warp;
}

void block_barrier(uint32_t id, int site) {
  if (id != 0) stop(kUnsupported, site, id);
  if (block_arrived && block_site != site) stop(kDivergence, site);
  block_site = site;
  if (++block_arrived < launch.threads) return wait_here(site);
  block_arrived = 0;
  for (int thread = 0; thread < launch.threads; ++thread) fibers[thread].wait = kNothing;
}

uint64_t& brought(int place) { return warps[llir_sreg_warpid].in[llir_sreg_laneid][place]; }

// Stacks for the fibers. The lowest page of each stays out of reach: an overflow is a crash.
bool make_fibers() {
  stacks = mmap(nullptr, launch.threads * kStack, PROT_READ | PROT_WRITE, kAnywhere, -1, 0);
  if (stacks == MAP_FAILED) return false;
  for (int thread = 0; thread < launch.threads; ++thread) {
    char* const stack = static_cast<char*>(stacks) + thread * kStack;
    mprotect(stack, kGuard, PROT_NONE);
    Fiber& fiber = fibers[thread];
    fiber.started = false;
    getcontext(&fiber.start);
    fiber.start.uc_stack = {stack, 0, kStack};
    makecontext(&fiber.start, fiber_main, 0);
  }
  return true;
}

void run_program(int64_t program) {
  llir_sreg_ctaid_x = program % launch.grid[0];
  llir_sreg_ctaid_y = program / launch.grid[0] % launch.grid[1];
  llir_sreg_ctaid_z = program / launch.grid[0] / launch.grid[1];
  // NaN: a read of what was never written shows in the results.
  std::memset(reinterpret_cast<void*>(kShared), 0xff, launch.shared_bytes);
  if (launch.cooperative) return run_together();
  for (int i = 0; i < launch.threads; ++i) {
    become(launch.backwards ? launch.threads - 1 - i : i);
    launch.entry(launch.arguments);
  }
}

void run_programs() {
  const int64_t programs = launch.grid[0] * launch.grid[1] * launch.grid[2];
  if (_setjmp(end_of_run)) return;
  for (int64_t i = 0; i < programs; ++i) run_program(launch.backwards ? programs - 1 - i : i);
}

}  // namespace

extern "C" {

// 0, or the kind of the fault that stopped the launch, described in *stopped.
int llir_run(const Launch* wanted, Fault* stopped) {
  launch = *wanted;
  fault = {};
  block_arrived = 0;
  std::memset(warps, 0, sizeof(warps));
  std::memset(launch.sites, 0, launch.site_count * sizeof(Site));
  llir_sreg_ntid_x = launch.threads;
  llir_sreg_nctaid_x = launch.grid[0];
  llir_sreg_nctaid_y = launch.grid[1];
  llir_sreg_nctaid_z = launch.grid[2];
  void* const shared = reinterpret_cast<void*>(kShared);
  const int flags = kAnywhere | MAP_FIXED_NOREPLACE;
  if (launch.shared_bytes > static_cast<int64_t>(kSharedMost) ||
      mmap(shared, kSharedMost, PROT_READ | PROT_WRITE, flags, -1, 0) != shared) {
    fault.kind = kNoMemory;
  } else {
    if (!launch.cooperative || make_fibers()) {
      run_programs();
    } else {
      fault.kind = kNoMemory;
    }
    if (launch.cooperative && stacks != MAP_FAILED) munmap(stacks, launch.threads * kStack);
    munmap(shared, kSharedMost);
  }
  *stopped = fault;
  return fault.kind;
}

}  // extern "C"
