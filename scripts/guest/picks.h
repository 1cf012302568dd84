/* Which page a workload touches next: how the ranks of pages.h are drawn.
 *
 * A rank is hotness where a workload has hot pages, so that hot spots lie
 * anywhere in memory, each a run of pages.
 */
#ifndef PICKS_H
#define PICKS_H

#include <stdint.h>

/* 95% from the hottest 5% of memory, 4.5% from the next 20%, the rest from anywhere. */
uint64_t pick_hot(void);

/* By Zipf's law with exponent 0.99 over all pages in use; `prepare_zipf` first. */
uint64_t pick_zipf(void);
void prepare_zipf(void);

/* One after the other in order of guest physical address, round and round. */
uint64_t pick_next(void);
void prepare_sweep(void);

/* Any data page, each as likely as the other. */
uint64_t pick_data(void);

#endif
