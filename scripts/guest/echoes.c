/* Network and serial port: the host sends back what it gets, the guest checks both ways' work.
 *
 * A message is its sequence number and words tied to it. One that does not come
 * back in time is lost, as is what was under way when the guest moved; one that
 * comes back with other words is wrong. The host checks what reaches it.
 */
#define _GNU_SOURCE
#include "devices.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <glob.h>
#include <net/if.h>
#include <net/if_arp.h>
#include <poll.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

#include "console.h"

enum {
    MESSAGE_WORDS = 128,
    MESSAGE_BYTES = MESSAGE_WORDS * 8,
    BURST = 8,                  /* messages under way at once */
    ECHO_LIMIT_MS = 1000,
    QUIET_MS = 50,
    BURST_PAUSE_US = 5000,
    PORT = 7,
};

static const char SERIAL_PORTS[] = "/dev/vport*p1";     /* the * is its place among virtio's */
static const char OUR_ADDRESS[] = "10.0.0.2", HOST_ADDRESS[] = "10.0.0.1";
static const unsigned char HOST_MAC[6] = {0x52, 0x54, 0, 0, 0, 1};

static void write_message(uint64_t *words, uint64_t sequence)
{
    words[0] = sequence;
    write_words(words + 1, MESSAGE_WORDS - 1, words_of_place(0, sequence));
}

/* Reads one message whole; 0 when it does not come in time. A datagram comes whole. */
static int read_message(int fd, uint64_t *words, int limit_ms)
{
    uint8_t *at = (uint8_t *)words, *end = at + MESSAGE_BYTES;
    struct pollfd ready = {.fd = fd, .events = POLLIN};
    while (at < end) {
        if (poll(&ready, 1, limit_ms) <= 0)
            return 0;
        ssize_t got = read(fd, at, (size_t)(end - at));
        if (got > 0)
            at += got;
    }
    return 1;
}

/* What is still on its way would be taken for the next message. */
static void drain(int fd)
{
    uint64_t words[MESSAGE_WORDS];
    while (read_message(fd, words, QUIET_MS))
        ;
}

static void send_burst(int fd, uint64_t sequence)
{
    uint64_t words[MESSAGE_WORDS];
    for (unsigned i = 0; i < BURST; i++) {
        write_message(words, sequence + i);
        const uint8_t *at = (const uint8_t *)words, *end = at + MESSAGE_BYTES;
        while (at < end) {
            ssize_t sent = write(fd, at, (size_t)(end - at));
            if (sent > 0)
                at += sent;
        }
    }
}

static void check_burst(struct device *device, int fd, uint64_t sequence)
{
    uint64_t words[MESSAGE_WORDS];
    for (unsigned i = 0; i < BURST; i++) {
        if (!read_message(fd, words, ECHO_LIMIT_MS) || words[0] != sequence + i) {
            device->lost += BURST - i;
            drain(fd);
            return;
        }
        if (words_are_right(words + 1, MESSAGE_WORDS - 1, words_of_place(0, sequence + i)))
            device->operations++;
        else
            found_wrong(device, "echo");
    }
}

static void exchange(struct device *device, int fd)
{
    for (uint64_t sequence = 1;; sequence += BURST) {
        send_burst(fd, sequence);
        check_burst(device, fd, sequence);
        pause_us(BURST_PAUSE_US);
    }
}

/* --- the serial port ---------------------------------------------------------------------- */

static void work_on_serial_port(struct device *device)
{
    glob_t found;
    int fd = glob(SERIAL_PORTS, 0, NULL, &found) ? -1 : open(*found.gl_pathv, O_RDWR | O_CLOEXEC);
    if (fd < 0)
        die(SERIAL_PORTS);
    exchange(device, fd);
}

/* --- the network -------------------------------------------------------------------------- */

static struct sockaddr_in address_of(const char *dotted)
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(PORT)};
    inet_pton(AF_INET, dotted, &address.sin_addr);
    return address;
}

/* An address, and one for the host that need not be asked for. */
static void set_up_network(int fd)
{
    struct sockaddr_in ours = address_of(OUR_ADDRESS), host = address_of(HOST_ADDRESS);
    struct ifreq interface = {.ifr_name = "eth0"};
    struct arpreq neighbour = {.arp_flags = ATF_PERM | ATF_COM, .arp_dev = "eth0"};
    memcpy(&interface.ifr_addr, &ours, sizeof ours);
    if (ioctl(fd, SIOCSIFADDR, &interface))
        die("SIOCSIFADDR");
    interface.ifr_flags = IFF_UP | IFF_RUNNING;
    if (ioctl(fd, SIOCSIFFLAGS, &interface))
        die("SIOCSIFFLAGS");
    memcpy(&neighbour.arp_pa, &host, sizeof host);
    neighbour.arp_ha.sa_family = ARPHRD_ETHER;
    memcpy(neighbour.arp_ha.sa_data, HOST_MAC, sizeof HOST_MAC);
    if (ioctl(fd, SIOCSARP, &neighbour))
        die("SIOCSARP");
}

static void work_on_network(struct device *device)
{
    struct sockaddr_in ours = address_of(OUR_ADDRESS), host = address_of(HOST_ADDRESS);
    int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0), on = 1;
    if (fd < 0)
        die("socket");
    set_up_network(fd);
    /* Without checksums: what is wrong shall reach us, not be dropped on the way. */
    if (setsockopt(fd, SOL_SOCKET, SO_NO_CHECK, &on, sizeof on) ||
        bind(fd, (struct sockaddr *)&ours, sizeof ours) ||
        connect(fd, (struct sockaddr *)&host, sizeof host))
        die("udp");
    exchange(device, fd);
}

void find_echoes(void)
{
    if (if_nametoindex("eth0"))
        add_device("network", work_on_network);
    glob_t found;
    if (!glob(SERIAL_PORTS, 0, NULL, &found))
        add_device("serial-port", work_on_serial_port);
}
