// Large blocks of memory from the system, zero-filled, and the request for two-megabyte pages, which spare the translation of
// addresses where a block is read from end to end for every token. Small ones from malloc: `new` would need C++'s own library.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#if defined(__unix__) || defined(__APPLE__)
#include <sys/mman.h>
#include <unistd.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace {

inline void ask_for_huge_pages([[maybe_unused]] uint8_t *memory, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    constexpr uintptr_t PAGE = 2 << 20;
    const uintptr_t begin = (reinterpret_cast<uintptr_t>(memory) + PAGE - 1) / PAGE * PAGE;
    const uintptr_t end = (reinterpret_cast<uintptr_t>(memory) + static_cast<uintptr_t>(bytes)) / PAGE * PAGE;
    if (end > begin) madvise(reinterpret_cast<void *>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

// Zero-filled, aligned to a page; pages are the system's only once they are touched. Null where there is none.
inline uint8_t *map_memory(int64_t bytes) {
    void *memory = mmap(nullptr, static_cast<size_t>(bytes), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    return memory == MAP_FAILED ? nullptr : static_cast<uint8_t *>(memory);
}

// Bytes that the machine has: what is larger than this is refused rather than promised.
inline double machine_memory() { return static_cast<double>(sysconf(_SC_PHYS_PAGES)) * static_cast<double>(sysconf(_SC_PAGE_SIZE)); }

// Memory for `count` T, which are not constructed; items is null where there is none.
template <class T>
struct Array {
    T *const items;

    explicit Array(int64_t count) : items(static_cast<T *>(std::malloc(static_cast<size_t>(count) * sizeof(T)))) {}
    ~Array() { std::free(items); }
    Array(const Array &) = delete;
    Array &operator=(const Array &) = delete;
};

// Under AddressSanitizer: bytes that nobody may touch, until their block is unmapped.
#if defined(__SANITIZE_ADDRESS__)
constexpr int64_t RED_ZONE = 64;
inline void forbid(uint8_t *from, int64_t bytes) { ASAN_POISON_MEMORY_REGION(from, static_cast<size_t>(bytes)); }
inline void allow(uint8_t *from, int64_t bytes) { ASAN_UNPOISON_MEMORY_REGION(from, static_cast<size_t>(bytes)); }
#else
constexpr int64_t RED_ZONE = 0;
inline void forbid(uint8_t *, int64_t) {}
inline void allow(uint8_t *, int64_t) {}
#endif

inline void unmap_memory(uint8_t *memory, int64_t bytes) {
    allow(memory, bytes);
    munmap(memory, static_cast<size_t>(bytes));
}

}  // namespace
