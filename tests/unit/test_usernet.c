#include "check.h"
#include "vmm/usernet.h"

static const char answer[] =
    "Hub -1 (net0):\r\n"
    "  Protocol[State]    FD  Source Address  Port   Dest. Address  Port RecvQ SendQ\r\n"
    "  TCP[HOST_FORWARD]  13       127.0.0.1 41899       10.0.2.15    22     0     0\r\n"
    "  TCP[HOST_FORWARD]  14       127.0.0.1 40001       10.0.2.15    80     0     0\r\n";

static void the_port_of_the_forward_is_found(void) {
    CHECK(usernet_find_port(answer, sizeof answer - 1, 22) == 41899);
    CHECK(usernet_find_port(answer, sizeof answer - 1, 80) == 40001);
    CHECK(usernet_find_port(answer, sizeof answer - 1, 443) == 0);
}

static void a_cut_or_foreign_text_has_no_port(void) {
    for (size_t n = 0; n < 150; n++)
        CHECK_SAID(usernet_find_port(answer, n, 22) == 0, "cut at %zu", n);
    CHECK(usernet_find_port("TCP[HOST_FORWARD] 1 127.0.0.1 99999 10.0.2.15 22 0 0\n", 53, 22) == 0);
    CHECK(usernet_find_port("", 0, 22) == 0);
}

int main(void) {
    the_port_of_the_forward_is_found();
    a_cut_or_foreign_text_has_no_port();
    return check_end();
}
