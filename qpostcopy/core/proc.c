#define _GNU_SOURCE
#include "proc.h"

#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

enum { MAX_VDSO_BYTES = 1 << 20 };

bool qpc_proc_stat(pid_t pid, pid_t tid, char *state, uint64_t *start_ticks)
{
    char path[64], text[1024];
    snprintf(path, sizeof path, "/proc/%d/task/%d/stat", pid, tid);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return false;
    ssize_t length = read(fd, text, sizeof text - 1);
    close(fd);
    if (length <= 0)
        return false;
    text[length] = 0;
    const char *at = strrchr(text, ')'); /* the name before it may hold anything */
    unsigned long long ticks;
    if (!at || sscanf(at + 1, " %c %*d %*d %*d %*d %*d %*u %*u %*u %*u %*u %*u %*u %*d %*d %*d"
                              " %*d %*d %*d %llu", state, &ticks) != 2)
        return false;
    *start_ticks = ticks;
    return true;
}

static int status_number(pid_t pid, pid_t tid, const char *name, int unknown)
{
    char path[64], line[256];
    int number = unknown;
    size_t length = strlen(name);
    snprintf(path, sizeof path, "/proc/%d/task/%d/status", pid, tid);
    FILE *status = fopen(path, "re");
    if (!status)
        return unknown;
    while (fgets(line, sizeof line, status))
        if (!strncmp(line, name, length) && sscanf(line + length, ": %d", &number) == 1)
            break;
    fclose(status);
    return number;
}

int qpc_proc_tracer(pid_t pid, pid_t tid)
{
    return status_number(pid, tid, "TracerPid", 0);
}

bool qpc_proc_filtered(pid_t pid, pid_t tid)
{
    return status_number(pid, tid, "Seccomp", 1) != 0;
}

/* `*mapped`: it has any mapping at all; a process that is ending gives them up first. */
static bool find_vdso(pid_t pid, pid_t tid, uint64_t *low, uint64_t *high, bool *mapped)
{
    char path[64], line[512];
    bool found = false;
    *mapped = false;
    snprintf(path, sizeof path, "/proc/%d/task/%d/maps", pid, tid);
    FILE *maps = fopen(path, "re");
    if (!maps)
        return false;
    while (!found && fgets(line, sizeof line, maps))
        found = strstr(line, "[vdso]") && sscanf(line, "%" SCNx64 "-%" SCNx64, low, high) == 2;
    rewind(maps); /* asked at the end: the file may have become empty while we read it */
    *mapped = fgetc(maps) != EOF;
    fclose(maps);
    return found && *high > *low && *high - *low <= MAX_VDSO_BYTES;
}

uint64_t qpc_proc_find_syscall(pid_t pid, pid_t tid, bool *mapped)
{
    uint64_t low, high, entry = 0;
    if (!find_vdso(pid, tid, &low, &high, mapped))
        return 0;
    size_t length = high - low;
    unsigned char *text = malloc(length);
    if (!text)
        return 0;
    struct iovec local = {text, length}, remote = {(void *)(uintptr_t)low, length};
    if (process_vm_readv(tid, &local, 1, &remote, 1, 0) != (ssize_t)length)
        *mapped = false; /* no longer */
    for (size_t i = 0; *mapped && !entry && i + 1 < length; i++)
        if (text[i] == 0x0f && text[i + 1] == 0x05)
            entry = low + i;
    free(text);
    return entry;
}
