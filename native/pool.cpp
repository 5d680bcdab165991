// A small thread pool of its own (a second OpenMP in a process that has torch's would fight it). Work is taken in ranges
// from a shared counter, so that a thread whose core is busy elsewhere takes fewer; where it streams from memory, half of a
// fair share comes first, in one piece: every new place costs the prefetchers a start. Idle workers spin for some
// microseconds, the time between the products of one token, then sleep on a condition variable. One caller at a time uses
// the workers; another does its work alone. Where the wait for workers at the end takes longer than the work (their cores
// are busy with something else), the caller does without them for a while, longer each time. No thread exists before more
// than one is asked for. A forked child starts anew.
#include "kernels.h"

#include <atomic>
#include <cstdlib>
#include <ctime>
#include <new>
#include <pthread.h>
#include <type_traits>

namespace {

constexpr int SPINS = 2000;
constexpr int MOST_WORKERS = 255;
constexpr int64_t STALL_NANOSECONDS = 20'000;  // a wait below this is no stall, however short the work
constexpr int MOST_ALONE = 256;

int64_t nanoseconds() {
    timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return int64_t{now.tv_sec} * 1'000'000'000 + now.tv_nsec;
}

inline void relax() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

struct Job {
    void (*run)(const void *, int64_t, int64_t);
    const void *call;
    int64_t count, grain, share, shares;  // the first `shares` ranges have `share` items, those after `grain`
};

struct Pool {
    pthread_mutex_t owner = PTHREAD_MUTEX_INITIALIZER;  // held by the caller whose job it is
    pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;  // guards the sleeping
    pthread_cond_t wake = PTHREAD_COND_INITIALIZER, done = PTHREAD_COND_INITIALIZER;
    int workers = 0, asleep = 0;
    bool caller_waits = false;
    int alone = 0, next_alone = 1;  // calls still to be done without workers; how many after the next stall
    Job job = {};
    // The number of the current job in the upper bits; below, how many workers may still join it.
    std::atomic<uint64_t> ticket{0};
    std::atomic<int64_t> next{0};  // range
    std::atomic<int> inside{0};  // workers that joined the job and have not left it
};

Pool pool;
static_assert(std::is_trivially_destructible_v<Pool>);  // workers may outlive static destructors

void work(Pool &p) {
    const Job job = p.job;
    for (;;) {
        const int64_t turn = p.next.fetch_add(1, std::memory_order_relaxed), later = turn - job.shares;
        const int64_t begin = later < 0 ? turn * job.share : job.shares * job.share + later * job.grain;
        if (begin >= job.count) return;
        job.run(job.call, begin, smaller(begin + (later < 0 ? job.share : job.grain), job.count));
    }
}

// Take a seat of the current job, if it has one left. Seats are taken with the job's number, so that a late worker cannot
// enter a job that it has not seen; `inside` rises before the seat is taken, so that the caller cannot miss it.
bool join(Pool &p) {
    p.inside.fetch_add(1, std::memory_order_seq_cst);
    uint64_t ticket = p.ticket.load(std::memory_order_seq_cst);
    while (ticket & MOST_WORKERS)
        if (p.ticket.compare_exchange_weak(ticket, ticket - 1, std::memory_order_seq_cst)) return true;
    return false;
}

void leave(Pool &p) {
    if (p.inside.fetch_sub(1, std::memory_order_seq_cst) != 1) return;
    pthread_mutex_lock(&p.mutex);
    if (p.caller_waits) pthread_cond_signal(&p.done);
    pthread_mutex_unlock(&p.mutex);
}

bool open_seats(const Pool &p) { return p.ticket.load(std::memory_order_seq_cst) & MOST_WORKERS; }

void *worker(void *argument) {
    Pool &p = *static_cast<Pool *>(argument);
    for (;;) {
        for (int spin = 0; spin < SPINS && !open_seats(p); ++spin) relax();
        if (!open_seats(p)) {
            pthread_mutex_lock(&p.mutex);
            ++p.asleep;
            while (!open_seats(p)) pthread_cond_wait(&p.wake, &p.mutex);
            --p.asleep;
            pthread_mutex_unlock(&p.mutex);
        }
        if (join(p)) work(p);
        leave(p);
    }
    return nullptr;
}

void hire(Pool &p, int wanted) {
    for (; p.workers < wanted; ++p.workers) {
        pthread_t thread;
        pthread_attr_t attributes;
        if (pthread_attr_init(&attributes) != 0) return;
        pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
        pthread_attr_setstacksize(&attributes, size_t{1} << 20);
        const int failed = pthread_create(&thread, &attributes, worker, &p);
        pthread_attr_destroy(&attributes);
        if (failed) return;
    }
}

void forget_workers() { new (&pool) Pool; }  // in a forked child, where they do not exist

[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, forget_workers);

struct Scratch {
    void *memory;
    size_t bytes;
};
thread_local Scratch scratch;
pthread_key_t scratch_key;  // frees it when its thread ends (a destructor would need C++'s own library)
[[maybe_unused]] const int created = pthread_key_create(&scratch_key, std::free);

}  // namespace

void run_parallel(void (*run)(const void *, int64_t, int64_t), const void *call, int64_t count, int64_t grain, int threads,
                  bool streams) {
    const int64_t ranges = divide_up(count, grain);
    int others = static_cast<int>(smaller(smaller(threads, ranges), MOST_WORKERS + 1)) - 1;
    Pool &p = pool;
    if (others < 1 || pthread_mutex_trylock(&p.owner) != 0) return run(call, 0, count);
    if (p.alone > 0) {
        --p.alone;
        pthread_mutex_unlock(&p.owner);
        return run(call, 0, count);
    }
    hire(p, others);
    others = static_cast<int>(smaller(others, p.workers));
    const int64_t start = nanoseconds();
    const int64_t shares = others + 1;
    p.job = {run, call, count, grain, streams ? larger(grain, count / (2 * shares)) : grain, shares};
    p.next.store(0, std::memory_order_relaxed);
    p.ticket.store(((p.ticket.load(std::memory_order_relaxed) >> 8) + 1) << 8 | static_cast<uint64_t>(others),
                   std::memory_order_seq_cst);
    pthread_mutex_lock(&p.mutex);
    if (p.asleep > 0) pthread_cond_broadcast(&p.wake);
    pthread_mutex_unlock(&p.mutex);
    work(p);
    p.ticket.fetch_and(~uint64_t{MOST_WORKERS}, std::memory_order_seq_cst);  // nobody joins any more
    const int64_t finished = nanoseconds();
    for (int spin = 0; spin < SPINS && p.inside.load(std::memory_order_seq_cst) != 0; ++spin) relax();
    if (p.inside.load(std::memory_order_seq_cst) != 0) {
        pthread_mutex_lock(&p.mutex);
        p.caller_waits = true;
        while (p.inside.load(std::memory_order_seq_cst) != 0) pthread_cond_wait(&p.done, &p.mutex);
        p.caller_waits = false;
        pthread_mutex_unlock(&p.mutex);
    }
    const int64_t waited = nanoseconds() - finished;
    const bool stalled = waited > STALL_NANOSECONDS && waited > finished - start;
    p.alone = stalled ? p.next_alone : 0;
    p.next_alone = static_cast<int>(stalled ? smaller(2 * p.next_alone, MOST_ALONE) : larger(1, p.next_alone / 2));
    pthread_mutex_unlock(&p.owner);
}

void *thread_scratch(size_t bytes) {
    if (scratch.bytes < bytes) {
        std::free(scratch.memory);
        const size_t rounded = (bytes + 4095) / 4096 * 4096;
        scratch.memory = std::aligned_alloc(64, rounded);
        scratch.bytes = scratch.memory ? rounded : 0;
        pthread_setspecific(scratch_key, scratch.memory);
    }
    return scratch.memory;
}
