/* What this machine can do at best, without QEMU and without our engine.
 *
 *   limits.c  the command line, errors, the clock, printing
 *   link.c    both ends of a TCP connection: bare throughput, round trips
 *   memory.c  a userfaultfd of our own: placing what a connection brings, single faults
 *
 * Nothing waits longer than DEADLINE_S for one thing. */
#ifndef LIMITS_H
#define LIMITS_H

#include <stdint.h>

#define NS_PER_S 1000000000ull

enum { PAGE_BYTES = 4096, FRAME_BYTES = 1 << 20, DEADLINE_S = 10 };

/* One line on stderr, exit status 1. `number` is an errno; 0: the message says it all. */
_Noreturn void fail(int number, const char *format, ...) __attribute__((format(printf, 2, 3)));

uint64_t now_ns(void); /* CLOCK_MONOTONIC */

/* FRAME_BYTES that were written already, so that no fault of theirs is measured. */
uint8_t *frame_create(void);

/* The content of every answer: each page is the frame's own bytes, but for its first and its
 * last word, which are tied to where in the answer it is. Stamps the pages that hold the
 * `bytes` bytes at `offset` (both count from the start of the answer; whole pages). */
void stamp(uint8_t *frame, uint64_t offset, uint64_t bytes);

/* Results: one JSON object on stdout. */
void print_transfer(uint64_t bytes, uint64_t spent_ns);
void print_latencies(uint64_t *spent_ns, uint64_t count); /* sorts them */

/* --- link.c ------------------------------------------------------------------------------- */

/* Listens on a port of the kernel's choice, prints it, and answers one client after the other
 * until stdin closes. */
_Noreturn void serve(const char *address);

int connect_to(const char *address, const char *port);
void ask(int server, uint64_t answer_bytes);
void receive(int server, uint8_t *data, uint64_t bytes);

void measure_socket(const char *address, const char *port, uint64_t bytes);
void measure_roundtrip(const char *address, const char *port, uint64_t count,
                       uint64_t answer_bytes);

/* --- memory.c ----------------------------------------------------------------------------- */

void measure_place(const char *address, const char *port, uint64_t bytes);
/* How the handler waits for a fault. */
enum waiting {
    WAIT_POLL,      /* in poll(), wherever the scheduler puts it */
    WAIT_SAME_CORE, /* in poll(), on the core of who touches: no other core has to be woken */
    WAIT_SPIN,      /* not at all: it asks again and again */
};

void measure_fault(enum waiting waiting, uint64_t count);

#endif
