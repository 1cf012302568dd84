/* The error record: every fallible function of the core returns a code and
 * fills one of these, as its last argument. Python turns it into an exception
 * in one place (core/__init__.py), from a table that a test proves complete. */
#ifndef QPC_ERROR_H
#define QPC_ERROR_H

#include <stdint.h>

/* cdef-begin */
enum qpc_code {
    QPC_OK = 0,
    QPC_STOPPED,   /* asked to stop, and did */
    QPC_CLOSED,    /* the peer closed the lane */
    QPC_LANE,      /* a system call on a lane failed: see error_number */
    QPC_TIMEOUT,   /* a deadline passed */
    QPC_PROTOCOL,  /* the peer sent what no sane peer sends */
    QPC_GONE,      /* QEMU's address space is gone */
    QPC_STRAY,     /* EEXIST on a page that our map calls missing, where that is fatal */
    QPC_REFUSED,   /* the target is in a state that we do not touch */
    QPC_SYSTEM,    /* a system call failed: see error_number */
    QPC_NO_MEMORY,
    QPC_CODES      /* how many there are */
};

struct qpc_error {
    int code;
    int error_number;    /* errno, or 0 */
    char operation[80];  /* which call, in words */
    uint64_t address;    /* HVA or offset, what `operation` makes clear; 0: none */
    uint64_t length;
};
/* cdef-end */

/* Fill the record and return `code`, so that callers can `return qpc_fail(...)`. */
int qpc_fail(struct qpc_error *error, int code, int error_number, const char *operation,
             uint64_t address, uint64_t length);

#endif
