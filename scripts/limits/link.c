/* Both ends of a TCP connection. A request says how many bytes to answer; a bulk transfer is
 * one with a long answer, a round trip one with a short. */
#define _GNU_SOURCE
#include <errno.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <unistd.h>

#include "limits.h"

/* As long as a page request on the engine's demand lane; both ends are this very program. */
struct request {
    uint64_t magic, answer_bytes, unused;
};

static const uint64_t MAGIC = 0x71706C696D697473u;

/* What a wait that ran into its deadline leaves in errno says something else. */
static int wait_errno(void)
{
    return errno == EAGAIN || errno == EINPROGRESS ? ETIMEDOUT : errno;
}

static uint64_t least(uint64_t a, uint64_t b) { return a < b ? a : b; }

static struct addrinfo *resolve(const char *address, const char *port)
{
    struct addrinfo *found;
    struct addrinfo hints = {.ai_flags = AI_NUMERICHOST | AI_NUMERICSERV,
                             .ai_socktype = SOCK_STREAM};
    int code = getaddrinfo(address, port, &hints, &found);
    if (code)
        fail(0, "address %s port %s: %s", address, port, gai_strerror(code));
    return found;
}

/* No delay, and no wait without an end. */
static void tune(int fd)
{
    int on = 1;
    struct timeval most = {.tv_sec = DEADLINE_S};
    if (setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on) ||
        setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &most, sizeof most) ||
        setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &most, sizeof most))
        fail(errno, "setsockopt");
}

/* --- the client --------------------------------------------------------------------------- */

int connect_to(const char *address, const char *port)
{
    struct addrinfo *peer = resolve(address, port);
    int fd = socket(peer->ai_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0)
        fail(errno, "socket");
    tune(fd);
    if (connect(fd, peer->ai_addr, peer->ai_addrlen))
        fail(wait_errno(), "connect to %s port %s", address, port);
    freeaddrinfo(peer);
    return fd;
}

void ask(int server, uint64_t answer_bytes)
{
    struct request request = {MAGIC, answer_bytes, 0};
    if (send(server, &request, sizeof request, MSG_NOSIGNAL) != sizeof request)
        fail(wait_errno(), "send of a request");
}

void receive(int server, uint8_t *data, uint64_t bytes)
{
    while (bytes) {
        ssize_t got = recv(server, data, bytes, MSG_WAITALL);
        if (got < 0)
            fail(wait_errno(), "receive");
        if (!got)
            fail(0, "receive: the peer closed the connection");
        data += got;
        bytes -= (uint64_t)got;
    }
}

void measure_socket(const char *address, const char *port, uint64_t bytes)
{
    uint8_t *frame = frame_create();
    int server = connect_to(address, port);
    uint64_t start_ns = now_ns();
    ask(server, bytes);
    for (uint64_t left = bytes; left;) {
        uint64_t size = least(left, FRAME_BYTES);
        receive(server, frame, size);
        left -= size;
    }
    print_transfer(bytes, now_ns() - start_ns);
    close(server);
}

void measure_roundtrip(const char *address, const char *port, uint64_t count,
                       uint64_t answer_bytes)
{
    uint8_t *frame = frame_create();
    uint64_t *spent_ns = calloc(count, sizeof *spent_ns);
    if (!spent_ns)
        fail(errno, "calloc");
    int server = connect_to(address, port);
    for (uint64_t i = 0; i < count; i++) {
        uint64_t start_ns = now_ns();
        ask(server, answer_bytes);
        receive(server, frame, answer_bytes);
        spent_ns[i] = now_ns() - start_ns;
    }
    print_latencies(spent_ns, count);
    close(server);
    free(spent_ns);
}

/* --- the server --------------------------------------------------------------------------- */

/* Whether all of it was sent: the client that gave up says why, the server goes on. */
static int send_all(int client, const uint8_t *data, uint64_t bytes)
{
    while (bytes) {
        ssize_t sent = send(client, data, bytes, MSG_NOSIGNAL);
        if (sent <= 0)
            return 0;
        data += sent;
        bytes -= (uint64_t)sent;
    }
    return 1;
}

static int answer(int client, uint8_t *frame)
{
    struct request request;
    if (recv(client, &request, sizeof request, MSG_WAITALL) != sizeof request ||
        request.magic != MAGIC)
        return 0;
    for (uint64_t offset = 0; offset < request.answer_bytes; offset += FRAME_BYTES) {
        uint64_t size = least(request.answer_bytes - offset, FRAME_BYTES);
        stamp(frame, offset, size);
        if (!send_all(client, frame, size))
            return 0;
    }
    return 1;
}

static int listen_at(const char *address)
{
    struct addrinfo *own = resolve(address, "0");
    int fd = socket(own->ai_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0)
        fail(errno, "socket");
    if (bind(fd, own->ai_addr, own->ai_addrlen) || listen(fd, SOMAXCONN))
        fail(errno, "listen at %s", address);
    freeaddrinfo(own);
    return fd;
}

static void print_port(int listener)
{
    struct sockaddr_storage own;
    socklen_t length = sizeof own;
    char port[NI_MAXSERV];
    if (getsockname(listener, (struct sockaddr *)&own, &length))
        fail(errno, "getsockname");
    int code = getnameinfo((struct sockaddr *)&own, length, NULL, 0, port, sizeof port,
                           NI_NUMERICSERV);
    if (code)
        fail(0, "getnameinfo: %s", gai_strerror(code));
    printf("{\"port\": %s}\n", port);
    fflush(stdout);
}

/* Ends the process when whoever started it closes its stdin, or dies. */
static void *watch_stdin(void *unused)
{
    char byte;
    while (read(STDIN_FILENO, &byte, 1) > 0) {
    }
    _Exit(0);
    return unused;
}

void serve(const char *address)
{
    uint8_t *frame = frame_create();
    pthread_t watcher;
    int listener = listen_at(address);
    int code = pthread_create(&watcher, NULL, watch_stdin, NULL);
    if (code)
        fail(code, "pthread_create");
    print_port(listener);
    for (;;) {
        int client = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
        if (client < 0)
            fail(errno, "accept");
        tune(client);
        while (answer(client, frame)) {
        }
        close(client);
    }
}
