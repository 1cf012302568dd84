#include "uffd.h"

#include <errno.h>
#include <linux/userfaultfd.h>
#include <sys/ioctl.h>
#include <time.h>
#include <unistd.h>

static int system_ioctl(int fd, unsigned long request, void *argument)
{
    return ioctl(fd, request, argument);
}

static int64_t system_now_us(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000 + now.tv_nsec / 1000;
}

const struct qpc_ops qpc_system_ops = {system_ioctl, read, system_now_us};

/* `progress` is the signed answer field: bytes done, or -errno, or 0 if the
 * kernel did not write it. EAGAIN with progress is how it reports a short copy. */
static enum qpc_result classify(int failed, int64_t progress, uint64_t length, uint64_t *done_bytes)
{
    *done_bytes = 0;
    if (!failed) {
        *done_bytes = length;
        return QPC_PLACED;
    }
    switch (errno) {
    case EAGAIN:
        if (progress <= 0)
            return QPC_RETRY;
        *done_bytes = (uint64_t)progress;
        return QPC_PARTIAL;
    case EEXIST:
        return QPC_ALREADY;
    case ESRCH:
        return QPC_SPACE_GONE;
    default:
        return QPC_FAILED;
    }
}

enum qpc_result qpc_uffd_copy(const struct qpc_ops *ops, int uffd, uint64_t hva, const void *source,
                              uint64_t length, uint64_t *done_bytes)
{
    struct uffdio_copy copy = {
        .dst = hva, .src = (uintptr_t)source, .len = length, .mode = UFFDIO_COPY_MODE_DONTWAKE};
    int failed = ops->ioctl(uffd, UFFDIO_COPY, &copy);
    return classify(failed, copy.copy, length, done_bytes);
}

enum qpc_result qpc_uffd_zero(const struct qpc_ops *ops, int uffd, uint64_t hva, uint64_t length,
                              uint64_t *done_bytes)
{
    struct uffdio_zeropage zero = {.range = {.start = hva, .len = length},
                                   .mode = UFFDIO_ZEROPAGE_MODE_DONTWAKE};
    int failed = ops->ioctl(uffd, UFFDIO_ZEROPAGE, &zero);
    return classify(failed, zero.zeropage, length, done_bytes);
}

int qpc_uffd_api(int uffd, struct qpc_error *error)
{
    struct uffdio_api api = {.api = UFFD_API, .features = UFFD_FEATURE_MISSING_SHMEM};
    if (ioctl(uffd, UFFDIO_API, &api))
        return qpc_fail(error, QPC_SYSTEM, errno, "UFFDIO_API", api.features, 0);
    return QPC_OK;
}

int qpc_uffd_register_missing(int uffd, uint64_t hva, uint64_t length, struct qpc_error *error)
{
    const uint64_t needed =
        1ull << _UFFDIO_COPY | 1ull << _UFFDIO_ZEROPAGE | 1ull << _UFFDIO_WAKE;
    struct uffdio_register range = {.range = {.start = hva, .len = length},
                                    .mode = UFFDIO_REGISTER_MODE_MISSING};
    if (ioctl(uffd, UFFDIO_REGISTER, &range))
        return qpc_fail(error, QPC_SYSTEM, errno, "UFFDIO_REGISTER", hva, length);
    if ((range.ioctls & needed) != needed)
        return qpc_fail(error, QPC_SYSTEM, EOPNOTSUPP,
                        "UFFDIO_REGISTER: COPY, ZEROPAGE or WAKE missing", hva, length);
    return QPC_OK;
}

int qpc_uffd_unregister(int uffd, uint64_t hva, uint64_t length, struct qpc_error *error)
{
    struct uffdio_range range = {.start = hva, .len = length};
    if (ioctl(uffd, UFFDIO_UNREGISTER, &range) == 0)
        return QPC_OK;
    int code = errno == ESRCH ? QPC_GONE : QPC_SYSTEM;
    return qpc_fail(error, code, errno, "UFFDIO_UNREGISTER", hva, length);
}

int qpc_uffd_wake_by(const struct qpc_ops *ops, int uffd, uint64_t hva, uint64_t length,
                     struct qpc_error *error)
{
    struct uffdio_range range = {.start = hva, .len = length};
    if (ops->ioctl(uffd, UFFDIO_WAKE, &range) == 0)
        return QPC_OK;
    int code = errno == ESRCH ? QPC_GONE : QPC_SYSTEM;
    return qpc_fail(error, code, errno, "UFFDIO_WAKE", hva, length);
}

int qpc_uffd_wake(int uffd, uint64_t hva, uint64_t length, struct qpc_error *error)
{
    return qpc_uffd_wake_by(&qpc_system_ops, uffd, hva, length, error);
}
