/* The ioctls of a userfaultfd that belongs to another process's address space,
 * each result classified once.
 *
 * Source of the rules: Documentation/admin-guide/mm/userfaultfd.rst and
 * fs/userfaultfd.c of Linux 6.1 and 6.18. */
#ifndef QPC_UFFD_H
#define QPC_UFFD_H

#include <stdint.h>
#include <sys/types.h>

#include "error.h"

/* Where tests can put an EAGAIN, a short copy, an ESRCH; NULL members never are. */
struct qpc_ops {
    int (*ioctl)(int fd, unsigned long request, void *argument); /* as ioctl(2) */
    ssize_t (*read)(int fd, void *buffer, size_t length);        /* as read(2) */
    int64_t (*now_us)(void);                                     /* CLOCK_MONOTONIC */
};

extern const struct qpc_ops qpc_system_ops;

enum qpc_result {
    QPC_PLACED = 1, /* all of it */
    QPC_ALREADY,    /* EEXIST on the first page: it is there; wake it all the same */
    QPC_PARTIAL,    /* the first `done` bytes were placed; call again for the rest */
    QPC_RETRY,      /* nothing done, mm changing: an event is pending, drain it first */
    QPC_SPACE_GONE, /* ESRCH: the address space is no more */
    QPC_FAILED      /* errno says why; ENOENT: not one registered mapping (any more) */
};

/* Copy `length` bytes from `source` to `hva` without waking anybody. `done_bytes`
 * is what was placed, whatever the result. errno is left as the ioctl set it. */
enum qpc_result qpc_uffd_copy(const struct qpc_ops *ops, int uffd, uint64_t hva, const void *source,
                              uint64_t length, uint64_t *done_bytes);

/* The same with zero pages, which it allocates. */
enum qpc_result qpc_uffd_zero(const struct qpc_ops *ops, int uffd, uint64_t hva, uint64_t length,
                              uint64_t *done_bytes);

int qpc_uffd_wake_by(const struct qpc_ops *ops, int uffd, uint64_t hva, uint64_t length,
                     struct qpc_error *error);

/* cdef-begin */
/* UFFDIO_API with the features we need (MISSING_SHMEM); once in the life of a userfaultfd.
 * No event is asked for: QEMU's main loop would wait for us whenever its guest gives memory
 * back, our death included, and a right result does not need it (docs/discards.md). */
int qpc_uffd_api(int uffd, struct qpc_error *error);
int qpc_uffd_register_missing(int uffd, uint64_t hva, uint64_t length, struct qpc_error *error);
int qpc_uffd_unregister(int uffd, uint64_t hva, uint64_t length, struct qpc_error *error);

/* Wake every thread that waits in the range; faults read but unanswered are raised again. */
int qpc_uffd_wake(int uffd, uint64_t hva, uint64_t length, struct qpc_error *error);
/* cdef-end */

#endif
