#include "machine.h"

enum {
    /* 16550 at COM1: data, line status and its bits. */
    SERIAL_DATA = 0x3F8,
    SERIAL_STATUS = 0x3FD,
    CAN_READ = 1 << 0,
    CAN_WRITE = 1 << 5,
    /* PM1a control of the ICH9, where QEMU's firmware puts it; sleep type 0 is S5 there. */
    PM1A_CONTROL = 0x604,
    SLEEP_ENABLE = 1 << 13,
    /* HPET (IA-PC HPET specification 1.0a), in 32-bit registers. */
    HPET_PERIOD = 1,
    HPET_CONFIGURATION = 4,
    HPET_COUNTER_LOW = 60,
    HPET_COUNTER_HIGH = 61,
    HPET_RUN = 1,
    PERIOD_FEMTOSECONDS = 10000000,
    TICKS_PER_US = 1000000000 / PERIOD_FEMTOSECONDS,
};

static volatile uint32_t *const hpet = (volatile uint32_t *)0xFED00000;

static void write_port_8(uint16_t port, uint8_t value)
{
    __asm__ volatile("outb %0, %1" : : "a"(value), "Nd"(port));
}

static void write_port_16(uint16_t port, uint16_t value)
{
    __asm__ volatile("outw %0, %1" : : "a"(value), "Nd"(port));
}

static uint8_t read_port_8(uint16_t port)
{
    uint8_t value;
    __asm__ volatile("inb %1, %0" : "=a"(value) : "Nd"(port));
    return value;
}

uint32_t divide(uint64_t *value, uint32_t by)
{
    uint32_t high = (uint32_t)(*value >> 32), low = (uint32_t)*value, rest = high % by;
    __asm__("divl %2" : "+a"(low), "+d"(rest) : "rm"(by) : "cc");
    *value = (uint64_t)(high / by) << 32 | low;
    return rest;
}

/* --- serial port ------------------------------------------------------------------------- */

static void put_byte(char byte)
{
    while (!(read_port_8(SERIAL_STATUS) & CAN_WRITE)) {
    }
    write_port_8(SERIAL_DATA, (uint8_t)byte);
}

static void put_text(const char *text)
{
    while (*text)
        put_byte(*text++);
}

static void put_number(uint64_t value)
{
    char digits[21], *at = digits + sizeof digits - 1;
    *at = 0;
    do
        *--at = (char)('0' + divide(&value, 10));
    while (value);
    put_text(at);
}

void say_line(const char *word, const uint64_t *numbers, unsigned count, const char *tail)
{
    put_text(word);
    for (unsigned i = 0; i < count; i++) {
        put_byte(' ');
        put_number(numbers[i]);
    }
    if (tail) {
        put_byte(' ');
        put_text(tail);
    }
    put_byte('\n');
}

int hear(void)
{
    return read_port_8(SERIAL_STATUS) & CAN_READ ? read_port_8(SERIAL_DATA) : -1;
}

/* --- clock and power --------------------------------------------------------------------- */

void start_clock(void)
{
    if (hpet[HPET_PERIOD] != PERIOD_FEMTOSECONDS) {
        say_line("@dead no HPET of 100 MHz", 0, 0, 0);
        power_off();
    }
    hpet[HPET_CONFIGURATION] = HPET_RUN;
}

uint64_t now_us(void)
{
    uint32_t high, low;
    do {
        high = hpet[HPET_COUNTER_HIGH];
        low = hpet[HPET_COUNTER_LOW];
    } while (high != hpet[HPET_COUNTER_HIGH]);
    uint64_t ticks = (uint64_t)high << 32 | low;
    divide(&ticks, TICKS_PER_US);
    return ticks;
}

void power_off(void)
{
    write_port_16(PM1A_CONTROL, SLEEP_ENABLE);
    for (;;)
        __asm__ volatile("hlt");
}
