/* Work for the devices that QEMU gave this guest, all at once, beside the workload.
 *
 * Each device has a thread of its own and content that it can check: what a
 * device carries are runs of words (`write_words`) tied to a place and a
 * generation. Threads only count; the workload's thread says what they counted:
 *   @d NAME OPERATIONS LOST
 * An operation is one that came back right; lost are messages without an echo
 * (what was under way when the guest moved). What came back wrong is a corrupt page: `@c`.
 */
#ifndef DEVICES_H
#define DEVICES_H

#include <stdatomic.h>
#include <stdint.h>

struct device {
    const char *name;
    void (*work)(struct device *device);        /* for ever */
    _Atomic uint64_t operations, lost, wrong;
    const char *_Atomic why;                    /* of the latest wrong one */
    uint64_t wrong_said;
};

/* Kernel word devices=on: starts the work on every device that is there. */
void start_devices(void);

/* Says how far each device is; counts what was found wrong since in memory.corrupt. */
void report_devices(void);

/* --- for the devices' own files ----------------------------------------------------------- */

void add_device(const char *name, void (*work)(struct device *device));
void found_wrong(struct device *device, const char *why);
void pause_us(unsigned us);

uint64_t words_of_place(uint64_t place, uint64_t generation);
void write_words(uint64_t *words, unsigned count, uint64_t first);
int words_are_right(const uint64_t *words, unsigned count, uint64_t first);

void find_disks(void);      /* disks.c: /dev/vda and on */
void find_echoes(void);     /* echoes.c: eth0 and /dev/vport*p1 */
void find_screen(void);     /* screen.c: the VGA's memory and its text */

#endif
