//! How little of what was freed this process keeps.

#![allow(unsafe_code)]

/// From now on one thread's freed memory is the next one's, and what is free at the end goes back to the kernel. Otherwise each
/// thread that has read a listing keeps as much for good. Other C libraries than glibc have no such wishes.
pub fn keep_little() {
    #[cfg(target_env = "gnu")]
    for (wish, value) in [(libc::M_ARENA_MAX, 1), (libc::M_TRIM_THRESHOLD, 128 << 10)] {
        // SAFETY: two integers, of which glibc looks at no memory of ours.
        if unsafe { libc::mallopt(wish, value) } == 0 {
            tracing::debug!(wish, value, "glibc does not take this: more memory is kept");
        }
    }
}

/// Gives back what is free between what is in use: after many objects came and went that is most of the heap, of which glibc
/// by itself gives back only the end. Looks through all of it.
pub fn give_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: touches free memory only; whether there was any does not matter.
    unsafe {
        libc::malloc_trim(0)
    };
}
