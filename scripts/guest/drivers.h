/* Drivers of the devices that QEMU gives this guest: kernel modules in /drivers. */
#ifndef DRIVERS_H
#define DRIVERS_H

/* Loads them all, in the order of their names, which is that of their dependencies. */
void load_drivers(void);

#endif
