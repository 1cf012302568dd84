/* Drives core/inject.c from the outside, many injections in one process, so that the
 * sanitizers see them all. Prints one line of JSON.
 *
 *   injector PID COUNT DEADLINE_MS NUMBER [ARG...]    the same call COUNT times
 *   injector PID COUNT DEADLINE_MS once-each          opens and closes COUNT times in the target:
 *       the number of the new file descriptor is the same each time only if every call ran
 *       exactly once, and its result was the one reported
 *
 * With INJECTOR_GOES_ON in the environment a refusal is counted and does not end the run.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>

#include "inject.h"

static int64_t now_us(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000 + now.tv_nsec / 1000;
}

int main(int argc, char **argv)
{
    if (argc < 5) return 2;
    int pid = atoi(argv[1]), deadline_ms = atoi(argv[3]);
    long count = atol(argv[2]), done = 0, wrong = 0, refused = 0;
    int once_each = !strcmp(argv[4], "once-each");
    uint64_t args[6] = {0};
    for (int i = 5; i < argc && i < 11; i++) args[i - 5] = strtoull(argv[i], NULL, 0);
    struct qpc_error error = {0};
    int64_t result = 0, first = INT64_MIN, start_us = now_us(), worst_us = 0;
    int code = QPC_OK;
    int goes_on = getenv("INJECTOR_GOES_ON") != NULL;
    for (; done < count; done++) {
        int64_t began_us = now_us();
        long number = once_each ? SYS_epoll_create1 : atol(argv[4]);
        code = qpc_inject_syscall(pid, number, args, deadline_ms, &result, &error);
        if (code == QPC_REFUSED && goes_on) {
            refused++;
            continue;
        }
        if (code != QPC_OK) break;
        if (first == INT64_MIN) first = result;
        wrong += result != first;
        if (once_each) {
            int64_t closed = -1;
            const uint64_t fd[6] = {(uint64_t)result};
            do code = qpc_inject_syscall(pid, SYS_close, fd, deadline_ms, &closed, &error);
            while (code == QPC_REFUSED && goes_on);
            if (code != QPC_OK) break;
            wrong += closed != 0;
        }
        int64_t took_us = now_us() - began_us;
        if (took_us > worst_us) worst_us = took_us;
    }
    printf("{\"code\": %d, \"errno\": %d, \"operation\": \"%s\", \"address\": %llu, \"done\": %ld, "
           "\"wrong\": %ld, \"refused\": %ld, \"result\": %lld, \"total_us\": %lld, "
           "\"worst_us\": %lld}\n",
           code, error.error_number, error.operation, (unsigned long long)error.address, done,
           wrong, refused,
           (long long)result, (long long)(now_us() - start_us), (long long)worst_us);
    return 0;
}
