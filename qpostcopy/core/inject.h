/* Make another process run one system call, and leave no trace of it.
 *
 * A userfaultfd belongs to the address space that created it, and stock QEMU
 * hands none out; so QEMU is made to create one. This is the only part of the
 * project that touches a running QEMU's threads, and what it guarantees is:
 *
 *  - the result is that of the call, or there is none: a step that did not run
 *    the instruction is never taken for one that did;
 *  - registers and signal mask are given back on every path, and a call that
 *    the thread was sleeping in is restarted by the kernel as after any stop;
 *  - a stopped, traced, dying or foreign process is refused, not touched;
 *  - a seccomp filter never sees the call: it could kill QEMU for one that QEMU itself never
 *    makes. It is suspended for that one step of that one thread, or the target refused;
 *  - other children of the calling process are neither waited for nor reaped.
 *
 * x86_64 only. Needs CAP_SYS_PTRACE, or what ptrace(2) accepts in its place; where a filter is
 * in force CAP_SYS_ADMIN too, no filter of our own, and CONFIG_CHECKPOINT_RESTORE.
 */
#ifndef QPC_INJECT_H
#define QPC_INJECT_H

#include <stdint.h>

#include "error.h"

/* cdef-begin */
/* Run system call `number` in process `pid`, in its main thread or, where that
 * one cannot be stopped in time, in another. `*result` is what the kernel left
 * in rax: a negative errno as it is.
 *
 * QPC_OK       it ran, once
 * QPC_REFUSED  stopped by a signal, traced by another (`address`: by whom), not ours to trace
 *              (errno EPERM), its seccomp filter not ours to suspend (EACCES), or not 64-bit
 * QPC_GONE     the process ended, or was never there
 * QPC_TIMEOUT  `deadline_ms` passed; the call did not run, or was interrupted
 *
 * May outlast the deadline in one case: the injected call itself sleeps where
 * no signal reaches it. Letting go then would leave the thread with our registers.
 */
int qpc_inject_syscall(int pid, long number, const uint64_t args[6], int deadline_ms,
                       int64_t *result, struct qpc_error *error);

/* The same for the process that has this pid *and* started at `start_ticks`
 * (/proc/PID/stat, field 22), so that a recycled pid is never touched; 0: any. */
int qpc_inject_syscall_into(int pid, uint64_t start_ticks, long number, const uint64_t args[6],
                            int deadline_ms, int64_t *result, struct qpc_error *error);
/* cdef-end */

#endif
