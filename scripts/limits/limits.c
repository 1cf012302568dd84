/* limits serve ADDRESS                           {"port": N}, then answers until stdin closes
 * limits socket ADDRESS PORT BYTES               {"bytes": N, "us": T}
 * limits place ADDRESS PORT BYTES                {"bytes": N, "us": T}
 * limits fault poll|same-core|spin COUNT         {"count": N, "p50_us": T, "p90_us": T, ...}
 * limits roundtrip ADDRESS PORT COUNT ANSWER     likewise; ANSWER is in bytes
 *
 * One JSON object on stdout; trouble is one line on stderr and exit status 1. */
#define _GNU_SOURCE
#include "limits.h"

#include <errno.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

enum { MOST_SAMPLES = 1000000, MOST_ANSWER_BYTES = FRAME_BYTES };
#define MOST_BYTES (1ull << 40)

void fail(int number, const char *format, ...)
{
    char what[256];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(what, sizeof what, format, arguments);
    va_end(arguments);
    fprintf(stderr, "limits: %s%s%s\n", what, number ? ": " : "", number ? strerror(number) : "");
    _Exit(1); /* a thread of ours may be waiting for a page */
}

uint64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * NS_PER_S + (uint64_t)now.tv_nsec;
}

uint8_t *frame_create(void)
{
    uint8_t *frame = mmap(NULL, FRAME_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS,
                          -1, 0);
    if (frame == MAP_FAILED)
        fail(errno, "mmap of a frame");
    memset(frame, 0xA5, FRAME_BYTES);
    return frame;
}

void stamp(uint8_t *frame, uint64_t offset, uint64_t bytes)
{
    for (uint64_t at = 0; at < bytes; at += PAGE_BYTES) {
        uint64_t first = 0x51A3B00000000000u + (offset + at) / PAGE_BYTES, last = ~first;
        memcpy(frame + at, &first, sizeof first);
        memcpy(frame + at + PAGE_BYTES - sizeof last, &last, sizeof last);
    }
}

/* --- results ------------------------------------------------------------------------------ */

void print_transfer(uint64_t bytes, uint64_t spent_ns)
{
    printf("{\"bytes\": %" PRIu64 ", \"us\": %.3f}\n", bytes, (double)spent_ns / 1000);
}

static int compare(const void *left, const void *right)
{
    uint64_t a = *(const uint64_t *)left, b = *(const uint64_t *)right;
    return (a > b) - (a < b);
}

/* By nearest rank, in us. */
static double percentile(const uint64_t *sorted_ns, uint64_t count, uint64_t percent)
{
    return (double)sorted_ns[(count * percent + 99) / 100 - 1] / 1000;
}

void print_latencies(uint64_t *spent_ns, uint64_t count)
{
    qsort(spent_ns, count, sizeof *spent_ns, compare);
    printf("{\"count\": %" PRIu64 ", \"p50_us\": %.3f, \"p90_us\": %.3f, \"p99_us\": %.3f}\n",
           count, percentile(spent_ns, count, 50), percentile(spent_ns, count, 90),
           percentile(spent_ns, count, 99));
}

/* --- the command line --------------------------------------------------------------------- */

static uint64_t number(const char *text, const char *name, uint64_t unit, uint64_t most)
{
    char *end;
    errno = 0;
    uint64_t value = strtoull(text, &end, 10);
    if (errno || *end || *text < '0' || *text > '9' || !value || value % unit || value > most)
        fail(0, "%s: expected %" PRIu64 " to %" PRIu64 " in steps of %" PRIu64 ", got %s", name,
             unit, most, unit, text);
    return value;
}

static void run_serve(char **words) { serve(words[0]); }

static void run_socket(char **words)
{
    measure_socket(words[0], words[1], number(words[2], "BYTES", PAGE_BYTES, MOST_BYTES));
}

static void run_place(char **words)
{
    measure_place(words[0], words[1], number(words[2], "BYTES", PAGE_BYTES, MOST_BYTES));
}

static enum waiting waiting_named(const char *name)
{
    static const char *const names[] = {
        [WAIT_POLL] = "poll", [WAIT_SAME_CORE] = "same-core", [WAIT_SPIN] = "spin"};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        if (!strcmp(name, names[i]))
            return (enum waiting)i;
    fail(0, "fault: none of poll, same-core, spin: %s", name);
}

static void run_fault(char **words)
{
    measure_fault(waiting_named(words[0]), number(words[1], "COUNT", 1, MOST_SAMPLES));
}

static void run_roundtrip(char **words)
{
    measure_roundtrip(words[0], words[1], number(words[2], "COUNT", 1, MOST_SAMPLES),
                      number(words[3], "ANSWER", 1, MOST_ANSWER_BYTES));
}

static const struct {
    const char *name;
    int words;
    void (*run)(char **words);
} commands[] = {
    {"serve", 1, run_serve}, {"socket", 3, run_socket},       {"place", 3, run_place},
    {"fault", 2, run_fault}, {"roundtrip", 4, run_roundtrip},
};

int main(int count, char **words)
{
    for (size_t i = 0; count > 1 && i < sizeof commands / sizeof *commands; i++) {
        if (strcmp(words[1], commands[i].name) || count - 2 != commands[i].words)
            continue;
        commands[i].run(words + 2);
        if (fflush(stdout))
            fail(errno, "write of the result");
        return 0;
    }
    fail(0, "usage: limits serve ADDRESS | socket ADDRESS PORT BYTES | place ADDRESS PORT BYTES"
            " | fault poll|same-core|spin COUNT | roundtrip ADDRESS PORT COUNT ANSWER");
}
