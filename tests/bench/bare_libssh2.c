#include <arpa/inet.h>
#include <errno.h>
#include <libssh2.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

/* The floor that vmsfs is measured against: the same work, done by a program that knows nothing but
 * libssh2.
 *
 *     bare_libssh2 ADDRESS PORT USER KEY_FILE KNOWN_HOSTS ALIAS
 *
 * Connects, then takes one request a line on stdin and answers each with the nanoseconds it took,
 * on stdout:
 *
 *     set TEXT   a file in the guest is replaced by TEXT and a newline (printf > tmp && mv tmp
 * file), by a resident shell get        the file is read, by the resident shell echo       the
 * resident shell says something: the bare round trip true       a channel is opened and runs `true`
 *
 * What it says before the first request is how long the connection took. */

#define BENCH_FILE "/etc/profile.d/bench_libssh2.sh"
#define MARK '\036'

static LIBSSH2_SESSION *session;

static void __attribute__((noreturn)) fail(const char *what) {
    char *why = NULL;
    if (session)
        libssh2_session_last_error(session, &why, NULL, 0);
    fprintf(stderr, "bare_libssh2: %s: %s\n", what, why && *why ? why : strerror(errno));
    exit(EXIT_FAILURE);
}

static long long now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static int connect_to(const char *address, const char *port) {
    struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons((uint16_t)atoi(port))};
    int one = 1;
    if (inet_pton(AF_INET, address, &to.sin_addr) != 1)
        fail("not an IPv4 address");
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0 || setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one) < 0 ||
        connect(fd, (struct sockaddr *)&to, sizeof to) < 0)
        fail("cannot connect");
    return fd;
}

static void check_host_key(const char *known_hosts, const char *alias) {
    size_t length;
    int type;
    const char *key = libssh2_session_hostkey(session, &length, &type);
    LIBSSH2_KNOWNHOSTS *hosts = libssh2_knownhost_init(session);
    if (!hosts ||
        libssh2_knownhost_readfile(hosts, known_hosts, LIBSSH2_KNOWNHOST_FILE_OPENSSH) < 0)
        fail(known_hosts);
    if (libssh2_knownhost_check(hosts, alias, key, length,
                                LIBSSH2_KNOWNHOST_TYPE_PLAIN | LIBSSH2_KNOWNHOST_KEYENC_RAW,
                                NULL) != LIBSSH2_KNOWNHOST_CHECK_MATCH)
        fail("the host key is another one");
    libssh2_knownhost_free(hosts);
}

static LIBSSH2_CHANNEL *run(const char *command) {
    LIBSSH2_CHANNEL *channel = libssh2_channel_open_session(session);
    if (!channel || libssh2_channel_exec(channel, command) < 0)
        fail(command);
    return channel;
}

static void run_true(void) {
    LIBSSH2_CHANNEL *channel = run("true");
    char rest[64];
    while (libssh2_channel_read(channel, rest, sizeof rest) > 0)
        ;
    if (libssh2_channel_wait_closed(channel) < 0 || libssh2_channel_get_exit_status(channel) != 0)
        fail("true");
    libssh2_channel_free(channel);
}

/* Output of so many bytes, read to its end. */
static void run_out(const char *bytes) {
    static char command[128], block[65536];
    snprintf(command, sizeof command, "head -c %s /dev/zero", bytes);
    LIBSSH2_CHANNEL *channel = run(command);
    long long got = 0;
    ssize_t n;
    while ((n = libssh2_channel_read(channel, block, sizeof block)) > 0)
        got += n;
    if (got != atoll(bytes) || libssh2_channel_wait_closed(channel) < 0)
        fail(command);
    libssh2_channel_free(channel);
}

/* Input of so many bytes, until the command has taken all of it. */
static void run_in(const char *bytes) {
    static char block[65536];
    LIBSSH2_CHANNEL *channel = run("cat >/dev/null");
    for (long long left = atoll(bytes); left > 0;) {
        ssize_t n = libssh2_channel_write(
            channel, block, left < (long long)sizeof block ? (size_t)left : sizeof block);
        if (n < 0)
            fail("write");
        left -= n;
    }
    if (libssh2_channel_send_eof(channel) < 0 || libssh2_channel_wait_eof(channel) < 0 ||
        libssh2_channel_wait_closed(channel) < 0 || libssh2_channel_get_exit_status(channel) != 0)
        fail("cat");
    libssh2_channel_free(channel);
}

/* One round trip of the resident shell: `script`, and then a mark with its status. */
static void shell_do(LIBSSH2_CHANNEL *shell, const char *script) {
    static char text[65536], answer[65536];
    int length =
        snprintf(text, sizeof text, "{ %s; } 2>&1 </dev/null; printf '\\036%%d\\n' $?\n", script);
    size_t got = 0;
    if (length < 0 || (size_t)length >= sizeof text)
        fail("the script is too long");
    for (ssize_t sent = 0; sent < length;) {
        ssize_t n = libssh2_channel_write(shell, text + sent, (size_t)(length - sent));
        if (n < 0)
            fail("write");
        sent += n;
    }
    char *mark = NULL;
    while (!mark || !memchr(mark, '\n', got - (size_t)(mark - answer))) {
        ssize_t n = libssh2_channel_read(shell, answer + got, sizeof answer - got);
        if (n <= 0)
            fail("read");
        got += (size_t)n;
        mark = memchr(answer, MARK, got);
    }
    if (mark[1] != '0')
        fail(script);
}

/* `text` has to be free of quotes. */
static void shell_set(LIBSSH2_CHANNEL *shell, const char *text) {
    static char script[32768];
    snprintf(script, sizeof script,
             "printf '%%s\\n' '%s' >" BENCH_FILE ".tmp && mv -f " BENCH_FILE ".tmp " BENCH_FILE,
             text);
    shell_do(shell, script);
}

int main(int argc, char **argv) {
    char *line = NULL;
    size_t size = 0;
    ssize_t n;
    if (argc != 7) {
        fprintf(stderr, "usage: bare_libssh2 ADDRESS PORT USER KEY_FILE KNOWN_HOSTS ALIAS\n");
        return 2;
    }
    long long start = now();
    if (libssh2_init(0) < 0)
        fail("libssh2_init");
    int fd = connect_to(argv[1], argv[2]);
    session = libssh2_session_init();
    if (!session || libssh2_session_handshake(session, fd) < 0)
        fail("handshake");
    check_host_key(argv[5], argv[6]);
    if (libssh2_userauth_publickey_fromfile(session, argv[3], NULL, argv[4], NULL) < 0)
        fail("authentication");
    run_true(); /* SSH works */
    printf("%lld\n", now() - start);
    fflush(stdout);

    LIBSSH2_CHANNEL *shell = NULL;
    while ((n = getline(&line, &size, stdin)) > 0) {
        if (line[n - 1] == '\n')
            line[n - 1] = '\0';
        if (!shell) {
            shell = run("umask 022; exec /bin/sh");
            shell_do(shell, ":");
        }
        start = now();
        if (strncmp(line, "set ", 4) == 0)
            shell_set(shell, line + 4);
        else if (strcmp(line, "get") == 0)
            shell_do(shell, "cat " BENCH_FILE);
        else if (strcmp(line, "echo") == 0)
            shell_do(shell, ":");
        else if (strcmp(line, "true") == 0)
            run_true();
        else if (strncmp(line, "out ", 4) == 0)
            run_out(line + 4);
        else if (strncmp(line, "in ", 3) == 0)
            run_in(line + 3);
        else
            fail(line);
        printf("%lld\n", now() - start);
        fflush(stdout);
    }
    free(line);
    if (shell)
        libssh2_channel_free(shell);
    libssh2_session_disconnect(session, "done");
    libssh2_session_free(session);
    close(fd);
    libssh2_exit();
    return 0;
}
