/* The fault trace of one migration: which pages its guest faulted on, in order.
 *
 * Written into a shared, preallocated file, so that a fault costs a few stores:
 * no system call, no allocation, no lock, and a killed handler leaves every
 * record that it had counted. One thread adds: whoever reads the userfaultfd.
 *
 * Bounded twice. Time: what a guest touches long after the switch says little
 * about what it needs first, and a recording without an end names all of memory,
 * in the end, which is the same as naming nothing. Records: the file lies in RAM
 * (/run), and 12 MiB a migration is a price that anybody can pay. What the bounds
 * leave out is counted.
 *
 * docs/trace.md has the format; qpostcopy/trace.py writes the head and reads all. */
#ifndef QPC_TRACE_H
#define QPC_TRACE_H

#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>

#include "error.h"

/* cdef-begin */
#define QPC_TRACE_RECORDS 1048576
#define QPC_TRACE_US 60000000 /* counted from the commit */
#define QPC_TRACE_RECORD_BYTES 12
/* cdef-end */

/* The head of the file; little endian. Behind it the table of blocks, then the records. */
struct qpc_trace_head {
    uint8_t magic[8];
    uint16_t version, block_count;
    uint32_t page_bytes, records_offset, zero;
    _Atomic uint64_t record_count; /* how many records are valid */
    _Atomic uint64_t left_out;     /* faults that a bound has left out */
    _Atomic uint64_t origin_us;    /* CLOCK_MONOTONIC of the commit; 0: not yet */
    uint64_t reserved;
};

struct qpc_trace {
    struct qpc_trace_head *head; /* NULL: nothing is recorded */
    uint8_t *records;
    size_t mapped_bytes;
    int fd;
};

/* Go on with the trace file at `path`, whose head and table Python wrote; its records begin at
 * `records_offset`. All of its room is allocated now. */
int qpc_trace_open(struct qpc_trace *trace, const char *path, uint32_t records_offset,
                   struct qpc_error *error);

/* Give back the room that was not used. The trace may be opened again. */
void qpc_trace_close(struct qpc_trace *trace);

/* Time counts from here; once in the life of a file. Any thread. */
void qpc_trace_begin(struct qpc_trace *trace, int64_t now_us);

/* A fault, read from the userfaultfd at `read_us`. */
void qpc_trace_add(struct qpc_trace *trace, uint32_t block, uint64_t page, int64_t read_us);

uint64_t qpc_trace_count(const struct qpc_trace *trace);
uint64_t qpc_trace_left_out(const struct qpc_trace *trace);

#endif
