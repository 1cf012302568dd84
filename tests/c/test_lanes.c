/* Page server and handler against each other over socket pairs, the loops in
 * threads (built once with ASan and UBSan, once with TSan), and hostile peers.
 * Faults are written into a pipe that stands in for the userfaultfd. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>

#include "fake_ram.h"
#include "source.h"

#define PAGES 6000
#define PUSH_LANES 2
#define LOOPS (2 + 2 * PUSH_LANES)

static char directory[] = "/tmp/qpc-lanes-XXXXXX";

struct rig {
    struct qpc_handler *handler;
    struct qpc_source *source;
    int ram, faults[2]; /* pipe */
    int lanes[1 + PUSH_LANES][2]; /* [demand, push...][handler's end, page server's end] */
    int codes[LOOPS];
    pthread_t threads[LOOPS], scan;
    bool no_scan, scans; /* no_scan: as if it took for ever */
};

static uint8_t content(uint64_t page, uint64_t at) { return (uint8_t)(page * 31 + at % 253 + 1); }

/* every third stretch of 50 pages a hole, of the rest every fifth page all zero bytes */
static int is_hole(uint64_t page) { return page / 50 % 3 == 1; }
static int is_zero(uint64_t page) { return !is_hole(page) && page % 5 == 0; }

static void rig_init(struct rig *rig, int push_from_fault)
{
    struct qpc_error error;
    uint64_t pages = PAGES;
    uint8_t page[QPC_PAGE_BYTES];
    rig->no_scan = rig->scans = false;
    fake_init(PAGES);
    rig->ram = memfd_create("ram", MFD_CLOEXEC);
    CHECK(!ftruncate(rig->ram, PAGES * QPC_PAGE_BYTES));
    for (uint64_t i = 0; i < PAGES; i++) {
        if (is_hole(i))
            continue;
        for (uint64_t at = 0; at < QPC_PAGE_BYTES; at++)
            page[at] = is_zero(i) ? 0 : content(i, at);
        CHECK(pwrite(rig->ram, page, sizeof page, (off_t)(i * QPC_PAGE_BYTES)) == sizeof page);
    }
    CHECK(!pipe2(rig->faults, O_NONBLOCK | O_CLOEXEC));
    rig->handler = fake_handler(directory, PAGES, rig->faults[0], 1);
    struct qpc_source_config config = {1, &pages, &rig->ram, push_from_fault, 0};
    CHECK(!qpc_source_create(&rig->source, &config, &error));
    struct qpc_extent schedule[] = {{0, 4000, 2000}, {0, 0, 4000}};
    CHECK(!qpc_source_set_schedule(rig->source, schedule, 2, &error));
}

static void rig_deinit(struct rig *rig)
{
    if (rig->scans)
        pthread_join(rig->scan, NULL);
    qpc_handler_destroy(rig->handler);
    qpc_source_destroy(rig->source);
    close(rig->ram);
    close(rig->faults[0]);
    close(rig->faults[1]);
}

static void connect_lanes(struct rig *rig)
{
    for (int i = 0; i < 1 + PUSH_LANES; i++)
        CHECK(!socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, rig->lanes[i]));
}

static void close_lanes(struct rig *rig)
{
    for (int i = 0; i < 1 + PUSH_LANES; i++)
        for (int end = 0; end < 2; end++)
            close(rig->lanes[i][end]);
}

/* One thread for each loop; `role` counts: demand of both, push lanes of both. */
struct job {
    struct rig *rig;
    unsigned role;
};

static void *run_job(void *argument)
{
    struct job job = *(struct job *)argument;
    struct rig *rig = job.rig;
    struct qpc_error error;
    free(argument);
    unsigned lane = job.role / 2, ours = job.role % 2;
    int fd = rig->lanes[lane][ours];
    if (lane == 0)
        rig->codes[job.role] = ours ? qpc_source_run_demand(rig->source, fd, &error)
                                    : qpc_handler_run_demand(rig->handler, fd, &error);
    else
        rig->codes[job.role] = ours ? qpc_source_run_push(rig->source, fd, lane - 1, &error)
                                    : qpc_handler_run_push(rig->handler, fd, &error);
    return NULL;
}

static void *run_scan(void *argument)
{
    struct qpc_error error;
    struct rig *rig = argument;
    CHECK(!qpc_source_run_scan(rig->source, &error));
    return NULL;
}

static void start(struct rig *rig)
{
    struct qpc_error error;
    CHECK(!qpc_handler_send_have(rig->handler, rig->lanes[0][0], &error));
    CHECK(!qpc_source_receive_have(rig->source, rig->lanes[0][1], 1000, &error));
    for (unsigned role = 0; role < LOOPS; role++) {
        struct job *job = malloc(sizeof *job);
        *job = (struct job){rig, role};
        CHECK(!pthread_create(&rig->threads[role], NULL, run_job, job));
    }
    if (!rig->no_scan && !rig->scans) { /* one for all sessions */
        CHECK(!pthread_create(&rig->scan, NULL, run_scan, rig));
        rig->scans = true;
    }
}

static void stop_and_join(struct rig *rig)
{
    qpc_handler_stop(rig->handler);
    qpc_source_stop(rig->source);
    for (unsigned role = 0; role < LOOPS; role++)
        pthread_join(rig->threads[role], NULL);
    qpc_handler_reset(rig->handler);
    qpc_source_reset(rig->source);
    close_lanes(rig);
}

static void fault(struct rig *rig, uint64_t page)
{
    struct uffd_msg message = {.event = UFFD_EVENT_PAGEFAULT};
    message.arg.pagefault.address = FAKE_HVA + page * QPC_PAGE_BYTES;
    CHECK(write(rig->faults[1], &message, sizeof message) == sizeof message);
}

static void wait_done(struct rig *rig)
{
    struct pollfd watch = {qpc_handler_done_fd(rig->handler), POLLIN, 0};
    CHECK(poll(&watch, 1, 60000) == 1);
}

/* A faulted page is there, soon. */
static void wait_there(uint64_t page)
{
    for (int i = 0; i < 60000; i++) {
        pthread_mutex_lock(&fake.lock);
        int there = fake.there[page];
        pthread_mutex_unlock(&fake.lock);
        if (there)
            return;
        usleep(1000);
    }
    CHECK(!"the faulted page never came");
}

static void check_all(struct rig *rig)
{
    struct qpc_handler_counters counters;
    qpc_handler_counters_read(rig->handler, &counters);
    for (uint64_t page = 0; page < PAGES; page++) {
        bool empty = is_hole(page) || is_zero(page);
        CHECK(empty || fake.there[page]);
        for (uint64_t at = 0; at < QPC_PAGE_BYTES; at++)
            CHECK(fake.bytes[page * QPC_PAGE_BYTES + at] == (empty ? 0 : content(page, at)));
    }
    CHECK(counters.remaining_pages == 0);
    CHECK(counters.hole_pages + counters.zero_pages + counters.push_pages + counters.demand_pages +
              counters.around_pages == PAGES);
    CHECK(counters.stray_pages == 0);
}

static void everything_arrives_once_with_faults_all_over(void)
{
    for (int push_from_fault = 0; push_from_fault < 2; push_from_fault++) {
        struct rig rig;
        rig_init(&rig, push_from_fault);
        connect_lanes(&rig);
        start(&rig);
        for (uint64_t i = 0; i < 300; i++)
            fault(&rig, i * 7919 % PAGES);
        wait_done(&rig);
        for (uint64_t i = 0; i < 300; i++)
            wait_there(i * 7919 % PAGES); /* zero pages too: somebody waits for them */
        stop_and_join(&rig);
        check_all(&rig);
        CHECK(rig.handler->shared->faults == 300);
        rig_deinit(&rig);
    }
}

/* In a terabyte the scan takes long; nothing else does. */
static void nobody_waits_for_the_scan(void)
{
    struct rig rig;
    rig_init(&rig, 0);
    rig.no_scan = true;
    connect_lanes(&rig);
    start(&rig);
    fault(&rig, 75);
    wait_done(&rig);
    wait_there(75);
    stop_and_join(&rig);
    check_all(&rig);
    CHECK(rig.handler->shared->hole_pages == 0);
    rig_deinit(&rig);
}

static void a_scan_outlives_its_session(void)
{
    struct rig rig;
    struct qpc_error error;
    rig_init(&rig, 0);
    qpc_source_stop(rig.source);
    CHECK(qpc_source_run_scan(rig.source, &error) == QPC_OK);
    CHECK(rig.source->blocks[0].settled == PAGES);
    rig.source->blocks[0].settled = 0;
    qpc_source_stop_scan(rig.source);
    qpc_source_reset(rig.source);
    CHECK(qpc_source_run_scan(rig.source, &error) == QPC_STOPPED);
    rig_deinit(&rig);
}

static void known_holes_are_told_and_not_read(void)
{
    struct rig rig;
    struct qpc_error error;
    rig_init(&rig, 0);
    CHECK(!qpc_source_run_scan(rig.source, &error));
    connect_lanes(&rig);
    start(&rig);
    wait_done(&rig);
    stop_and_join(&rig);
    check_all(&rig);
    CHECK(rig.handler->shared->hole_pages == PAGES / 3);
    rig_deinit(&rig);
}

static void lost_lanes_are_taken_up_where_they_were(void)
{
    struct rig rig;
    rig_init(&rig, 0);
    for (int session = 0; session < 5; session++) {
        connect_lanes(&rig);
        start(&rig);
        fault(&rig, (uint64_t)session * 1000 + 77);
        usleep(300);
        for (int i = 0; i < 1 + PUSH_LANES; i++)
            shutdown(rig.lanes[i][session % 2], SHUT_RDWR);
        stop_and_join(&rig);
    }
    connect_lanes(&rig);
    start(&rig);
    for (uint64_t session = 0; session < 5; session++)
        fault(&rig, session * 1000 + 77); /* as UFFDIO_WAKE makes the kernel do */
    wait_done(&rig);
    for (uint64_t session = 0; session < 5; session++)
        wait_there(session * 1000 + 77);
    stop_and_join(&rig);
    check_all(&rig);
    rig_deinit(&rig);
}

/* What one loop says to raw bytes from its peer, which then hangs up or not. */
static int loop_on(struct rig *rig, bool push, const void *bytes, size_t length, bool hang_up)
{
    struct qpc_error error;
    int pair[2];
    CHECK(!socketpair(AF_UNIX, SOCK_STREAM, 0, pair));
    CHECK(write(pair[1], bytes, length) == (ssize_t)length);
    if (hang_up)
        shutdown(pair[1], SHUT_WR);
    int code = push ? qpc_handler_run_push(rig->handler, pair[0], &error)
                    : qpc_handler_run_demand(rig->handler, pair[0], &error);
    close(pair[0]);
    close(pair[1]);
    return code;
}

static void hostile_peers_are_refused(void)
{
    struct rig rig;
    uint8_t bytes[QPC_FRAME_BYTES + QPC_PAGE_BYTES] = {0};
    struct qpc_frame request = {QPC_FRAME_REQUEST, 0, 0, 0, 1}, data = {QPC_FRAME_DATA, 0, 0, 0, 1};
    rig_init(&rig, 0);
    for (int push = 0; push < 2; push++) {
        CHECK(loop_on(&rig, push, bytes, QPC_FRAME_BYTES, false) == QPC_PROTOCOL); /* type 0 */
        uint8_t frame[QPC_FRAME_BYTES];
        qpc_frame_encode(&request, frame);
        CHECK(loop_on(&rig, push, frame, sizeof frame, false) == QPC_PROTOCOL); /* wrong way */
        qpc_frame_encode(&data, bytes);
        CHECK(loop_on(&rig, push, bytes, 100, true) == QPC_CLOSED); /* cut in the payload */
        CHECK(loop_on(&rig, push, bytes, 10, true) == QPC_CLOSED);  /* cut in the header */
        CHECK(loop_on(&rig, push, bytes, 0, true) == QPC_CLOSED);
        memset(bytes, 0, sizeof bytes);
    }
    CHECK(rig.handler->remaining_pages == PAGES); /* none of it placed a page */
    rig_deinit(&rig);
}

static void a_page_server_that_owes_an_answer_is_given_up(void)
{
    struct rig rig;
    struct qpc_error error;
    struct qpc_frame zero = {QPC_FRAME_ZERO, 0, 0, 10, 1};
    uint8_t bytes[QPC_FRAME_BYTES];
    int pair[2];
    rig_init(&rig, 0);
    CHECK(!socketpair(AF_UNIX, SOCK_STREAM, 0, pair));
    qpc_frame_encode(&zero, bytes);
    CHECK(write(pair[1], bytes, sizeof bytes) == sizeof bytes); /* it lives, and then stops */
    fault(&rig, 0);
    struct qpc_waiter waiter = {0, 2, qpc_system_ops.now_us() - 60000000};
    CHECK(!qpc_handler_add_waiter(rig.handler, waiter, &error));
    CHECK(qpc_handler_run_demand(rig.handler, pair[0], &error) == QPC_TIMEOUT);
    close(pair[0]);
    close(pair[1]);
    rig_deinit(&rig);
}

static void *run_local(void *argument)
{
    struct rig *rig = argument;
    struct qpc_error error;
    rig->codes[0] = qpc_handler_run_local(rig->handler, &error);
    return NULL;
}

static void what_is_known_is_answered_without_lanes(void)
{
    struct rig rig;
    pthread_t thread;
    rig_init(&rig, 0);
    qpc_handler_know_zero(rig.handler, 0, 50, 50, true);
    CHECK(!pthread_create(&thread, NULL, run_local, &rig));
    fault(&rig, 7);   /* nobody to ask: stays */
    fault(&rig, 60);
    wait_there(60);
    qpc_handler_stop(rig.handler);
    pthread_join(thread, NULL);
    qpc_handler_reset(rig.handler);
    CHECK(rig.codes[0] == QPC_STOPPED && !fake.there[7]);
    connect_lanes(&rig); /* and the next session serves it */
    start(&rig);
    fault(&rig, 7);
    wait_there(7);
    wait_done(&rig);
    stop_and_join(&rig);
    check_all(&rig);
    rig_deinit(&rig);
}

static void a_limit_is_kept(void)
{
    struct rig rig;
    rig_init(&rig, 0);
    rig.source->push_bytes_per_second = 20u << 20;
    int64_t start_us = qpc_system_ops.now_us();
    connect_lanes(&rig);
    start(&rig);
    wait_done(&rig);
    int64_t took_us = qpc_system_ops.now_us() - start_us;
    stop_and_join(&rig);
    check_all(&rig);
    /* 3200 pages have data: 0.62 s at 20 MiB/s; zero pages cost a header only */
    CHECK(took_us > 500000 && took_us < 5000000);
    rig_deinit(&rig);
}

static void a_batch_is_written_whole(void)
{
    struct qpc_error error;
    struct qpc_lane ends[2];
    struct qpc_batch batch;
    struct qpc_frame frame = {.type = QPC_FRAME_HAVE, .page_count = 1};
    const uint64_t pages = 2 * QPC_BATCH_FRAMES + 1;
    const uint8_t *payload;
    int pair[2], stop = eventfd(0, 0);
    CHECK(!socketpair(AF_UNIX, SOCK_STREAM, 0, pair));
    for (int i = 0; i < 2; i++)
        CHECK(!qpc_lane_init(&ends[i], pair[i], stop, &pages, 1, &error));
    qpc_batch_init(&batch, &ends[0]);
    for (frame.first_page = 0; frame.first_page < pages; frame.first_page++)
        CHECK(!qpc_batch_add(&batch, &frame, &error));
    for (int i = 0; i < 2; i++) /* again: nothing is left in it */
        CHECK(!qpc_batch_flush(&batch, &error));
    for (uint64_t i = 0; i < pages; i++)
        CHECK(!qpc_lane_next(&ends[1], &frame, &payload, &error) && frame.first_page == i);
    CHECK(qpc_lane_next(&ends[1], &frame, &payload, &error) == QPC_TIMEOUT);
    for (int i = 0; i < 2; i++) {
        qpc_lane_deinit(&ends[i]);
        close(pair[i]);
    }
    close(stop);
}

struct push {
    struct qpc_source *source;
    int fd, code;
};

static void *run_push(void *argument)
{
    struct push *push = argument;
    struct qpc_error error;
    push->code = qpc_source_run_push(push->source, push->fd, 0, &error);
    shutdown(push->fd, SHUT_WR);
    return NULL;
}

/* Every other page of 100,000 a hole, the rest sent: 1.2 MB of frames on lane 0. */
static int push_holes(uint64_t limit, bool fault_waits, bool stop, int64_t *took_us)
{
    enum { COUNT = 100000 };
    uint64_t pages = COUNT, hole_bytes = 0;
    uint8_t bytes[65536];
    int pair[2], ram = memfd_create("ram", MFD_CLOEXEC);
    struct qpc_error error;
    struct push push;
    pthread_t thread;
    struct qpc_source_config config = {1, &pages, &ram, 0, limit};
    CHECK(!qpc_source_create(&push.source, &config, &error));
    for (uint64_t page = 0; page < COUNT; page += 2)
        qpc_bits_set(&push.source->blocks[0].present, page, 1);
    qpc_bits_set(&push.source->blocks[0].sent, 0, COUNT);
    push.source->blocks[0].settled = COUNT;
    push.source->demand_waiting = fault_waits;
    CHECK(!socketpair(AF_UNIX, SOCK_STREAM, 0, pair));
    push.fd = pair[0];
    int64_t start_us = qpc_system_ops.now_us();
    CHECK(!pthread_create(&thread, NULL, run_push, &push));
    for (ssize_t got; (got = read(pair[1], bytes, sizeof bytes)) > 0; hole_bytes += (uint64_t)got)
        if (stop)
            qpc_source_stop(push.source);
    pthread_join(thread, NULL);
    *took_us = qpc_system_ops.now_us() - start_us;
    CHECK(stop || hole_bytes == (COUNT / 2 + 1) * QPC_FRAME_BYTES); /* and END */
    CHECK(stop || push.source->hole_pages == COUNT / 2);
    qpc_source_destroy(push.source);
    close(ram);
    close(pair[0]);
    close(pair[1]);
    return push.code;
}

/* A fragmented guest has millions; what holds for pages holds for them. */
static void holes_keep_the_limit_yield_and_stop(void)
{
    int64_t took_us;
    CHECK(push_holes(4000000, false, false, &took_us) == QPC_OK);
    CHECK(took_us > 250000); /* 0.3 s at 4 MB/s, but for the burst */
    CHECK(push_holes(0, true, false, &took_us) == QPC_OK);
    CHECK(took_us > 40 * 5000); /* 5 ms before each of 49 batches */
    CHECK(push_holes(4000000, false, true, &took_us) == QPC_STOPPED);
}

int main(void)
{
    CHECK(mkdtemp(directory));
    RUN(everything_arrives_once_with_faults_all_over);
    RUN(nobody_waits_for_the_scan);
    RUN(a_scan_outlives_its_session);
    RUN(known_holes_are_told_and_not_read);
    RUN(lost_lanes_are_taken_up_where_they_were);
    RUN(a_batch_is_written_whole);
    RUN(hostile_peers_are_refused);
    RUN(a_page_server_that_owes_an_answer_is_given_up);
    RUN(what_is_known_is_answered_without_lanes);
    RUN(a_limit_is_kept);
    RUN(holes_keep_the_limit_yield_and_stop);
    char path[300];
    const char *names[] = {"placed", "zero", "counters"};
    for (int i = 0; i < 3; i++) {
        snprintf(path, sizeof path, "%s/%s", directory, names[i]);
        unlink(path);
    }
    return rmdir(directory);
}
