// Tasks on PyTorch's own OpenMP threads, each on the first that is free, and what waiting for them has cost.
#pragma once

#include <time.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <functional>
#include <thread>
#include <vector>

#include "interface.h"

namespace dynaexq {

using Task = std::function<void(int64_t task, int64_t thread)>;
using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

constexpr int64_t WORTH_A_THREAD = 1 << 18;  // multiplications below which waking another one costs more

// So many of those that there are.
inline int64_t threads_for(int64_t multiplications, const Team& team) {
  return team.parallel ? std::clamp<int64_t>(multiplications / WORTH_A_THREAD, 1, team.num_threads) : 1;
}

inline int64_t nanoseconds(clockid_t clock) {
  timespec now;
  clock_gettime(clock, &now);
  return now.tv_sec * 1'000'000'000 + now.tv_nsec;
}

// Run tasks 0 .. count - 1 on so many threads. Each begins with a row of them, which read memory one behind the other,
// and goes on with what others have not begun.
inline void distribute(int64_t count, int64_t threads, Team& team, const Task& task) {
  struct alignas(64) Share {
    std::atomic<int64_t> next;
    int64_t end;
  };
  struct Shared {
    std::vector<Share> shares;
    std::atomic<int64_t> next_thread{0};
    const Task& task;
    std::thread::id caller = std::this_thread::get_id();
    int64_t caller_ended = 0;
  };
  threads = std::clamp<int64_t>(count, 1, threads);
  Shared shared{.shares = std::vector<Share>(threads), .task = task};
  for (int64_t i = 0; i < threads; i++)
    shared.shares[i].next = count * i / threads, shared.shares[i].end = count * (i + 1) / threads;
  auto work = [](void* data) {
    auto& shared = *(Shared*)data;
    const int64_t thread = shared.next_thread++, threads = shared.shares.size();
    for (int64_t turn = 0; turn < threads; turn++) {
      Share& share = shared.shares[(thread + turn) % threads];
      for (int64_t i; (i = share.next++) < share.end;) shared.task(i, thread);
    }
    if (std::this_thread::get_id() == shared.caller) shared.caller_ended = nanoseconds(CLOCK_MONOTONIC);
  };
  if (threads == 1) return work(&shared);
  const int64_t began = nanoseconds(CLOCK_MONOTONIC), ran = nanoseconds(CLOCK_THREAD_CPUTIME_ID);
  ((Parallel)team.parallel)(work, &shared, unsigned(threads), 0);
  const int64_t ended = nanoseconds(CLOCK_MONOTONIC);
  const int64_t off_core = ended - began - (nanoseconds(CLOCK_THREAD_CPUTIME_ID) - ran);
  team.took += ended - began;
  team.lost += std::max(ended - shared.caller_ended, off_core);
}

}  // namespace dynaexq
