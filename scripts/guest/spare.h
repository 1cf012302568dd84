/* Memory that the guest gives back to its host and takes again, beside the workload.
 *
 * A balloon or free page reporting needs free memory that had content once:
 * held back before the workload takes all there is, and written; freed when it
 * has. From then on it is the balloon's; or a process of its own takes it, looks
 * whether the kernel hands out zeroes, writes it, checks that, and frees it, again
 * and again. What it finds is printed on the serial port:
 *   @f ROUND WRONG         after each round: pages with wrong content so far
 */
#ifndef SPARE_H
#define SPARE_H

#include <stdint.h>

/* Takes and writes `bytes` of memory. `freeing_bytes`: how much of it the process of its
 * own is to use, which waits until then; 0: there is none. */
void hold_spare(uint64_t bytes, uint64_t freeing_bytes);
void free_spare(void);

#endif
