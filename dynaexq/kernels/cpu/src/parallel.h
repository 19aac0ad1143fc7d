// Tasks on PyTorch's own OpenMP threads, each on the first that is free, and what waiting for them has cost.
#pragma once

#include <time.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <functional>
#include <thread>

namespace dynaexq {

using Task = std::function<void(int64_t task, int64_t thread)>;
using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);  // OpenMP's GOMP_parallel

constexpr int64_t WORTH_A_THREAD = 1 << 18;  // multiplications below which waking another one costs more

// So many of those that there are; one where OpenMP was not found, whose address `parallel` is.
inline int64_t threads_for(int64_t multiplications, int64_t available, int64_t parallel) {
  return parallel ? std::clamp<int64_t>(multiplications / WORTH_A_THREAD, 1, available) : 1;
}

inline int64_t nanoseconds(clockid_t clock) {
  timespec now;
  clock_gettime(clock, &now);
  return now.tv_sec * 1'000'000'000 + now.tv_nsec;
}

// Run tasks 0 .. count - 1. Adds to `took` the nanoseconds in a parallel region, and to `lost` those of them in which
// the caller waited for others or was not on a core.
inline void distribute(int64_t count, int64_t threads, int64_t parallel, int64_t& took, int64_t& lost,
                       const Task& task) {
  struct Shared {
    std::atomic<int64_t> next_task{0}, next_thread{0};
    int64_t count;
    const Task& task;
    std::thread::id caller = std::this_thread::get_id();
    int64_t caller_ended = 0;
  } shared{.count = count, .task = task};
  auto work = [](void* data) {
    auto& shared = *(Shared*)data;
    const int64_t thread = shared.next_thread++;
    for (int64_t i; (i = shared.next_task++) < shared.count;) shared.task(i, thread);
    if (std::this_thread::get_id() == shared.caller) shared.caller_ended = nanoseconds(CLOCK_MONOTONIC);
  };
  if (std::min(threads, count) <= 1) return work(&shared);
  const int64_t began = nanoseconds(CLOCK_MONOTONIC), ran = nanoseconds(CLOCK_THREAD_CPUTIME_ID);
  ((Parallel)parallel)(work, &shared, unsigned(std::min(threads, count)), 0);
  const int64_t ended = nanoseconds(CLOCK_MONOTONIC);
  const int64_t off_core = ended - began - (nanoseconds(CLOCK_THREAD_CPUTIME_ID) - ran);
  took += ended - began;
  lost += std::max(ended - shared.caller_ended, off_core);
}

}  // namespace dynaexq
