// What the parts of the pretended GPU share.
#pragma once
#include <atomic>
#include <cstddef>

// Order and names of the counters, as counts.py reads them.
#define GPU_STUB_COUNTERS(each)                                                          \
    each(launches) each(waits) each(pageable_copies) each(copies_to_device)              \
    each(copies_to_host) each(copies_on_device) each(memsets) each(pinned_allocations)   \
    each(device_allocations) each(collectives) each(bytes_to_device) each(bytes_to_host) \
    each(bytes_on_device) each(bytes_pinned) each(bytes_collected)

#define GPU_STUB_DECLARE(name) extern std::atomic<long> name;
namespace counted {
GPU_STUB_COUNTERS(GPU_STUB_DECLARE)
}

namespace stub {
// Tell the watch, if there is one, what a call does. Never under a lock: it may wait for Python's.
void tell(const char* what, long num_bytes);
// A call that returns only when the device is done.
void waited(const char* what);
int current_device();
}  // namespace stub
