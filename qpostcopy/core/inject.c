/* See inject.h for what is guaranteed. How it is done, and why just so:
 *
 *   SEIZE      attaches without stopping; a thread that never stops is let go by
 *              our own end (that is why each attempt has a thread of its own)
 *   INTERRUPT  signals that arrive first are delivered, not swallowed; a group-stop
 *              is somebody's wish and is refused
 *   SETOPTIONS its seccomp filter is suspended (PTRACE_O_SUSPEND_SECCOMP), until `restore`
 *   SETSIGMASK nothing but SIGKILL, SIGSTOP and the step's own SIGTRAP gets through
 *   SETREGS    orig_rax = -1: the interrupted call is not restarted with borrowed registers
 *   SINGLESTEP over one `syscall` instruction of the target's vdso
 *   check      it ran if, and only if, rip stands behind the instruction; stops of
 *              another kind (SIGCONT, SIGSTOP) may come before it, or instead of it
 *   restore    registers, mask; then CONT and try again, or DETACH
 *
 * ptrace(2) has the rules. That no trap of ours is left behind, and none of another's lost,
 * tests/uffd/test_attach_inject.py watches under storms of every signal.
 */
#define _GNU_SOURCE
#include "inject.h"
#include "proc.h"

#include <dirent.h>
#include <elf.h>
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/uio.h>
#include <sys/user.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#if defined(__x86_64__)

enum { SYSCALL_BYTES = 2, QUICK_LOOKS = 20, POLL_FIRST_US = 20, POLL_LAST_US = 1000 };

static const uint64_t ALL_BUT_SIGTRAP = ~(UINT64_C(1) << (SIGTRAP - 1));

/* One attempt at one thread. */
struct job {
    pid_t pid;
    pid_t tid;
    uint64_t start_ticks;
    long number;
    const uint64_t *args;
    int64_t deadline_us;
    uint64_t entry;   /* of the `syscall` instruction in the target's vdso */
    bool unstoppable; /* out: this thread cannot be used; another may be */
    int64_t result;
    struct qpc_error *error;
};

struct stop {
    int signal;
    int event; /* PTRACE_EVENT_STOP, or 0: a signal is about to be delivered */
};

static const char STOPPED[] = "target is stopped by a signal";

static bool is_group_stop(const struct stop *stop)
{
    return stop->event == PTRACE_EVENT_STOP && stop->signal != SIGTRAP;
}

static int64_t clock_us(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000 + now.tv_nsec / 1000;
}

static int fail(struct job *job, int code, const char *operation)
{
    return qpc_fail(job->error, code, errno, operation, 0, 0);
}

/* For any ptrace call after SEIZE: a stopped tracee can only be lost to SIGKILL. */
static int lost(struct job *job, const char *operation)
{
    return fail(job, errno == ESRCH ? QPC_GONE : QPC_SYSTEM, operation);
}

/* --- waiting ----------------------------------------------------------------------------- */

/* Look at the tracee once. A stop is consumed; an end is only seen, and left for
 * the process's own parent to reap (which may be us, on another thread). */
static int look(struct job *job, struct stop *stop, bool *stopped)
{
    const int mine = WNOHANG | __WALL | __WNOTHREAD;
    siginfo_t info = {0};
    *stopped = false;
    if (waitid(P_PID, (id_t)job->tid, &info, WEXITED | WSTOPPED | WNOWAIT | mine) < 0)
        return fail(job, errno == ECHILD ? QPC_GONE : QPC_SYSTEM, "wait: target is gone");
    if (!info.si_pid)
        return QPC_OK;
    errno = 0;
    if (info.si_code != CLD_TRAPPED && info.si_code != CLD_STOPPED)
        return fail(job, QPC_GONE, "wait: target ended");
    info.si_pid = 0;
    if (waitid(P_PID, (id_t)job->tid, &info, WSTOPPED | mine) < 0 || !info.si_pid)
        return QPC_OK; /* killed since: the next look sees its end */
    stop->signal = info.si_status & 0xff;
    stop->event = info.si_status >> 8;
    *stopped = true;
    return QPC_OK;
}

/* The kernel has no wait with a deadline, and SIGCHLD belongs to our host process: look, at
 * first without a pause (a stop takes microseconds, and a pause would let the next signal of a
 * storm come before the next step), then sleep, a little longer each time. */
static int wait_stop(struct job *job, int64_t deadline_us, struct stop *stop)
{
    long pause_us = POLL_FIRST_US;
    for (int looks = 0;; looks++) {
        bool stopped;
        int code = look(job, stop, &stopped);
        if (code != QPC_OK || stopped)
            return code;
        errno = 0;
        if (clock_us() >= deadline_us)
            return fail(job, QPC_TIMEOUT, "wait: target does not stop");
        if (looks < QUICK_LOOKS)
            continue;
        nanosleep(&(struct timespec){.tv_nsec = pause_us * 1000}, NULL);
        pause_us = pause_us * 2 > POLL_LAST_US ? POLL_LAST_US : pause_us * 2;
    }
}

/* --- the sequence ------------------------------------------------------------------------ */

static int explain_seize(struct job *job)
{
    int reason = errno, tracer = qpc_proc_tracer(job->pid, job->tid);
    char state = 0;
    uint64_t ticks;
    bool there = qpc_proc_stat(job->pid, job->tid, &state, &ticks);
    if (!there || reason == ESRCH)
        return qpc_fail(job->error, QPC_GONE, reason, "seize: no such process", 0, 0);
    if (state == 'Z' || state == 'X') {
        job->unstoppable = true; /* a main thread that ended leaves others behind */
        return qpc_fail(job->error, QPC_GONE, reason, "seize: target is a zombie", 0, 0);
    }
    if (tracer)
        return qpc_fail(job->error, QPC_REFUSED, reason, "seize: traced by another process",
                        (uint64_t)tracer, 0);
    return qpc_fail(job->error, QPC_REFUSED, reason, "seize: not permitted", 0, 0);
}

static int seize(struct job *job)
{
    char state;
    uint64_t ticks;
    if (ptrace(PTRACE_SEIZE, job->tid, 0, 0))
        return explain_seize(job);
    /* From here on the tid cannot pass to another: even its zombie would be ours. */
    errno = 0;
    if (!qpc_proc_stat(job->pid, job->pid, &state, &ticks) ||
        (job->start_ticks && ticks != job->start_ticks))
        return fail(job, QPC_GONE, "seize: the pid is another's now");
    bool mapped;
    job->entry = qpc_proc_find_syscall(job->pid, job->tid, &mapped);
    if (job->entry)
        return QPC_OK;
    if (!mapped)
        return fail(job, QPC_GONE, "seize: target is ending");
    return fail(job, QPC_REFUSED, "no syscall instruction in its vdso");
}

/* Bring the thread to a stop that is ours. Whatever signal is under way is delivered. */
static int halt(struct job *job)
{
    struct stop stop;
    if (ptrace(PTRACE_INTERRUPT, job->tid, 0, 0))
        return lost(job, "interrupt");
    for (;;) {
        int code = wait_stop(job, job->deadline_us, &stop);
        if (code != QPC_OK) {
            job->unstoppable = code == QPC_TIMEOUT;
            return code;
        }
        if (stop.event == PTRACE_EVENT_STOP)
            break;
        if (ptrace(PTRACE_CONT, job->tid, 0, (long)(stop.event ? 0 : stop.signal)))
            return lost(job, "deliver a signal");
    }
    errno = 0;
    return is_group_stop(&stop) ? fail(job, QPC_REFUSED, STOPPED) : QPC_OK;
}

/* In a restartable sequence the kernel forgets, on the way to our instruction, that it must
 * be aborted: rseq(2). Then another moment will do. */
static bool in_restartable_sequence(const struct job *job, uint64_t rip)
{
#ifdef PTRACE_GET_RSEQ_CONFIGURATION
    struct __ptrace_rseq_configuration rseq;
    struct { uint32_t version, flags; uint64_t start_ip, length, abort_ip; } section;
    if (ptrace(PTRACE_GET_RSEQ_CONFIGURATION, job->tid, sizeof rseq, &rseq) != (long)sizeof rseq ||
        !rseq.rseq_abi_pointer)
        return false;
    uint64_t at = 0; /* struct rseq: two 32-bit words, then the pointer to the section */
    struct iovec local = {&at, sizeof at};
    struct iovec remote = {(void *)(uintptr_t)(rseq.rseq_abi_pointer + 8), sizeof at};
    if (process_vm_readv(job->tid, &local, 1, &remote, 1, 0) != (ssize_t)sizeof at || !at)
        return false;
    local = (struct iovec){&section, sizeof section};
    remote = (struct iovec){(void *)(uintptr_t)at, sizeof section};
    if (process_vm_readv(job->tid, &local, 1, &remote, 1, 0) != (ssize_t)sizeof section)
        return false;
    return rip - section.start_ip < section.length;
#else
    (void)job, (void)rip;
    return false;
#endif
}

struct context {
    struct user_regs_struct regs;
    uint64_t mask;
};

static int save(struct job *job, struct context *saved)
{
    struct iovec view = {&saved->regs, sizeof saved->regs};
    if (ptrace(PTRACE_GETREGSET, job->tid, NT_PRSTATUS, &view))
        return lost(job, "read registers");
    errno = 0;
    if (view.iov_len != sizeof saved->regs)
        return fail(job, QPC_REFUSED, "target is not a 64-bit process");
    if (ptrace(PTRACE_GETSIGMASK, job->tid, sizeof saved->mask, &saved->mask))
        return lost(job, "read the signal mask");
    return QPC_OK;
}

/* While no filter is in force, none need be suspended, and we may lack the right to. */
static int suspend_filter(struct job *job)
{
    if (!ptrace(PTRACE_SETOPTIONS, job->tid, 0, PTRACE_O_SUSPEND_SECCOMP))
        return QPC_OK;
    if (errno == ESRCH)
        return lost(job, "suspend its filter");
    if (!qpc_proc_filtered(job->pid, job->tid))
        return QPC_OK;
    return qpc_fail(job->error, QPC_REFUSED, EACCES, "its seccomp filter cannot be suspended", 0, 0);
}

static int restore(struct job *job, const struct context *saved)
{
    if (ptrace(PTRACE_SETOPTIONS, job->tid, 0, 0) ||
        ptrace(PTRACE_SETREGS, job->tid, 0, &saved->regs) ||
        ptrace(PTRACE_SETSIGMASK, job->tid, sizeof saved->mask, &saved->mask))
        return lost(job, "restore");
    return QPC_OK;
}

/* SIGTRAP stays unblocked: to force the step's own through a mask, the kernel would reset
 * the target's handler for it (force_sig_info in kernel/signal.c). */
static int borrow(struct job *job, const struct context *saved)
{
    struct user_regs_struct regs = saved->regs;
    regs.rip = job->entry;
    regs.orig_rax = UINT64_MAX;
    regs.rax = (uint64_t)job->number;
    regs.rdi = job->args[0], regs.rsi = job->args[1], regs.rdx = job->args[2];
    regs.r10 = job->args[3], regs.r8 = job->args[4], regs.r9 = job->args[5];
    if (ptrace(PTRACE_SETSIGMASK, job->tid, sizeof ALL_BUT_SIGTRAP, &ALL_BUT_SIGTRAP) ||
        ptrace(PTRACE_SETREGS, job->tid, 0, &regs))
        return lost(job, "borrow registers");
    return QPC_OK;
}

/* A signal stop of the step's own making, which the target must never see. */
static bool is_our_trap(const struct job *job, const struct stop *stop)
{
    siginfo_t info;
    return !stop->event && stop->signal == SIGTRAP &&
           !ptrace(PTRACE_GETSIGINFO, job->tid, 0, &info) && info.si_code > 0;
}

static bool trap_is_queued(const struct job *job)
{
    siginfo_t queued[8];
    struct __ptrace_peeksiginfo_args args = {.nr = 8};
    for (long count; (count = ptrace(PTRACE_PEEKSIGINFO, job->tid, &args, queued)) > 0;) {
        for (long i = 0; i < count; i++)
            if (queued[i].si_signo == SIGTRAP && queued[i].si_code > 0)
                return true;
        args.off += (uint64_t)count;
    }
    return false;
}

/* The call ran, but another stop (SIGCONT and SIGSTOP make one) came before the step's
 * SIGTRAP, which still waits in the queue and would kill the target. With its own
 * registers back, run it to that signal: the kernel takes it before any user code. */
static int drain_trap(struct job *job, const struct context *saved, struct stop *stop)
{
    while (!is_our_trap(job, stop) && trap_is_queued(job)) {
        if (ptrace(PTRACE_SETREGS, job->tid, 0, &saved->regs) ||
            ptrace(PTRACE_CONT, job->tid, 0, (long)(stop->event ? 0 : stop->signal)))
            return lost(job, "drain the trap");
        int code = wait_stop(job, INT64_MAX, stop);
        if (code != QPC_OK)
            return code;
    }
    return QPC_OK;
}

/* The signal that the target must still get when it goes on. One that our own step
 * caused (a fault at the instruction) is ours to swallow. */
static int signal_to_deliver(const struct job *job, const struct stop *stop)
{
    siginfo_t info;
    if (stop->event || ptrace(PTRACE_GETSIGINFO, job->tid, 0, &info))
        return 0;
    return info.si_code > 0 ? 0 : stop->signal;
}

/* What came of stepping with borrowed registers. */
struct outcome {
    struct stop stop;
    struct user_regs_struct regs;
    bool late;      /* the deadline passed meanwhile, and the call was interrupted */
    siginfo_t held; /* somebody else's SIGTRAP, kept for the target; si_signo 0: none */
};

/* One step. Past the deadline the call is interrupted, but the thread is waited for: it must
 * not leave with our registers. */
static int step_once(struct job *job, struct outcome *out)
{
    if (ptrace(PTRACE_SINGLESTEP, job->tid, 0, 0))
        return lost(job, "step");
    int code = wait_stop(job, job->deadline_us, &out->stop);
    if (code == QPC_TIMEOUT) {
        out->late = true;
        ptrace(PTRACE_INTERRUPT, job->tid, 0, 0);
        code = wait_stop(job, INT64_MAX, &out->stop);
    }
    if (code == QPC_OK && ptrace(PTRACE_GETREGS, job->tid, 0, &out->regs))
        code = lost(job, "read the result");
    return code;
}

/* Step until the instruction ran, or something comes between that must be dealt with first.
 * SIGCONT's notice and another's SIGTRAP need nothing from us but one more step. */
static int step(struct job *job, struct outcome *out)
{
    for (;;) {
        int code = step_once(job, out);
        if (code != QPC_OK || out->late || out->regs.rip != job->entry)
            return code;
        if (is_group_stop(&out->stop) || clock_us() >= job->deadline_us)
            return QPC_OK;
        if (out->stop.event)
            continue;
        if (out->stop.signal != SIGTRAP)
            return QPC_OK;
        ptrace(PTRACE_GETSIGINFO, job->tid, 0, &out->held);
    }
}

/* Did the call run to its end? The kernel's own codes (ERESTARTSYS and kin) say that it did
 * not, and wants to be called again; EINTR is our doing only if we interrupted it. */
static bool has_run(const struct job *job, const struct outcome *out)
{
    int64_t result = (int64_t)out->regs.rax;
    if (out->regs.rip != job->entry + SYSCALL_BYTES)
        return false;
    return !(result <= -512 && result >= -516) && !(out->late && result == -EINTR);
}

/* Give the thread back its own after a step. `*deliver`: the signal to go on with. */
static int settle(struct job *job, const struct context *saved, struct outcome *out, int *deliver)
{
    if (out->regs.rip == job->entry + SYSCALL_BYTES) {
        int code = drain_trap(job, saved, &out->stop);
        if (code != QPC_OK)
            return code;
    }
    *deliver = signal_to_deliver(job, &out->stop);
    /* In the place of our own trap, which is swallowed, goes the one that was held back. */
    if (!*deliver && out->held.si_signo && !out->stop.event &&
        !ptrace(PTRACE_SETSIGINFO, job->tid, 0, &out->held))
        *deliver = out->held.si_signo;
    return restore(job, saved);
}

/* One attempt at a halted thread. `*ran`: job->result is the call's. On return the thread is
 * stopped and its own again, or lost. */
static int try_once(struct job *job, bool *ran, int *deliver)
{
    struct context saved;
    struct outcome out = {0};
    *ran = false, *deliver = 0;
    int code = save(job, &saved);
    if (code != QPC_OK)
        return code;
    if (in_restartable_sequence(job, saved.regs.rip))
        return QPC_OK;
    code = suspend_filter(job);
    if (code != QPC_OK)
        return code;
    code = borrow(job, &saved);
    if (code == QPC_OK)
        code = step(job, &out);
    if (code == QPC_OK) {
        job->result = (int64_t)out.regs.rax;
        *ran = has_run(job, &out);
        code = settle(job, &saved, &out, deliver);
    } else {
        struct qpc_error why = *job->error;
        restore(job, &saved); /* in vain, most likely; but a thread that can have its own has it */
        *job->error = why;
    }
    errno = 0;
    if (code != QPC_OK || *ran)
        return code;
    if (out.late)
        return fail(job, QPC_TIMEOUT, "the call took too long");
    return is_group_stop(&out.stop) ? fail(job, QPC_REFUSED, STOPPED) : QPC_OK;
}

static int inject(struct job *job)
{
    for (;;) {
        bool ran;
        int deliver;
        int code = halt(job);
        if (code == QPC_TIMEOUT || code == QPC_GONE)
            return code; /* our end lets it go */
        if (code == QPC_OK)
            code = try_once(job, &ran, &deliver);
        else ran = false, deliver = 0;
        if (code != QPC_OK || ran) {
            int kept = errno;
            ptrace(PTRACE_DETACH, job->tid, 0, (long)deliver);
            errno = kept;
            return code;
        }
        if (ptrace(PTRACE_CONT, job->tid, 0, (long)deliver))
            return lost(job, "go on");
        errno = 0;
        if (clock_us() >= job->deadline_us)
            return fail(job, QPC_TIMEOUT, "the step was always eaten");
    }
}

static void *run_job(void *data)
{
    struct job *job = data;
    int code = seize(job);
    if (code == QPC_OK)
        code = inject(job);
    job->error->code = code;
    return NULL; /* the end of this thread detaches what is still attached */
}

/* All ptrace calls of an attempt come from one thread, which ends with it. Signals wait for its
 * end in this thread too: the death of a tracer in mid-step would leave the target with our
 * registers. (A process of several threads must see to its other threads itself.) */
static int run_attempt(struct job *job)
{
    pthread_t thread;
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int error_number = pthread_create(&thread, NULL, run_job, job);
    if (error_number)
        qpc_fail(job->error, QPC_SYSTEM, error_number, "pthread_create", 0, 0);
    else
        pthread_join(thread, NULL);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return job->error->code;
}

/* --- which thread ------------------------------------------------------------------------ */

/* The main thread first: it sleeps most of the time. The others only if it cannot be
 * stopped (it ended, or sleeps where signals do not reach it), each with half of what
 * is left of the time. */
static int try_others(struct job *job, int64_t deadline_us)
{
    char path[64];
    struct qpc_error first = *job->error;
    snprintf(path, sizeof path, "/proc/%d/task", job->pid);
    DIR *tasks = opendir(path);
    if (!tasks)
        return first.code;
    for (struct dirent *entry; first.code != QPC_OK && (entry = readdir(tasks));) {
        job->tid = atoi(entry->d_name);
        if (job->tid <= 0 || job->tid == job->pid)
            continue;
        int64_t now_us = clock_us();
        if (now_us >= deadline_us)
            break;
        job->deadline_us = now_us + (deadline_us - now_us) / 2;
        job->unstoppable = false;
        int code = run_attempt(job);
        if (code == QPC_OK || (!job->unstoppable && code != QPC_GONE))
            first = *job->error;
        if (code == QPC_REFUSED)
            break;
    }
    closedir(tasks);
    *job->error = first;
    return first.code;
}

int qpc_inject_syscall_into(int pid, uint64_t start_ticks, long number, const uint64_t args[6],
                            int deadline_ms, int64_t *result, struct qpc_error *error)
{
    char state;
    uint64_t ticks;
    int64_t now_us = clock_us(), deadline_us = now_us + (int64_t)deadline_ms * 1000;
    if (!qpc_proc_stat(pid, pid, &state, &ticks) || (start_ticks && ticks != start_ticks))
        return qpc_fail(error, QPC_GONE, ESRCH, "no such process", 0, 0);
    struct job job = {.pid = pid, .tid = pid, .start_ticks = ticks, .number = number, .args = args,
                      .deadline_us = now_us + (deadline_us - now_us) / 2, .error = error};
    qpc_fail(error, QPC_OK, 0, "", 0, 0);
    int code = run_attempt(&job);
    if (code != QPC_OK && job.unstoppable)
        code = try_others(&job, deadline_us);
    if (code == QPC_OK)
        qpc_fail(error, QPC_OK, 0, "", 0, 0); /* forget the attempts before */
    *result = job.result;
    return code;
}

#else

int qpc_inject_syscall_into(int pid, uint64_t start_ticks, long number, const uint64_t args[6],
                            int deadline_ms, int64_t *result, struct qpc_error *error)
{
    (void)pid, (void)start_ticks, (void)number, (void)args, (void)deadline_ms, (void)result;
    return qpc_fail(error, QPC_REFUSED, ENOSYS, "injection is x86_64 only", 0, 0);
}

#endif

int qpc_inject_syscall(int pid, long number, const uint64_t args[6], int deadline_ms,
                       int64_t *result, struct qpc_error *error)
{
    return qpc_inject_syscall_into(pid, 0, number, args, deadline_ms, result, error);
}
