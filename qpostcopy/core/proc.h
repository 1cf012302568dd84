/* What /proc says about another process's thread, as injection needs to know it. */
#ifndef QPC_PROC_H
#define QPC_PROC_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

/* State letter and start time in ticks (proc(5), fields 3 and 22). False: no such thread. */
bool qpc_proc_stat(pid_t pid, pid_t tid, char *state, uint64_t *start_ticks);

/* Who traces it; 0: nobody, or somebody in another pid namespace. */
int qpc_proc_tracer(pid_t pid, pid_t tid);

/* Whether a system call filter (seccomp) is in force there, as far as can be seen: in doubt, yes. */
bool qpc_proc_filtered(pid_t pid, pid_t tid);

/* Address of a `syscall` instruction in its vdso, or 0. `*mapped` tells the two failures
 * apart: false means that the process is ending and has no memory any more. */
uint64_t qpc_proc_find_syscall(pid_t pid, pid_t tid, bool *mapped);

#endif
