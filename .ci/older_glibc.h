/* Functions that moved into glibc's libc.so.6 with new versions, asked for in the versions that all glibcs have.
 * .ci/wheels includes this before every source: a wheel then serves systems that are older than the one it is built on. */
#define OLDER(name) __asm__(".symver " #name "," #name "@GLIBC_2.2.5")
OLDER(pthread_create);
OLDER(pthread_detach);
OLDER(pthread_join);
OLDER(pthread_mutex_trylock);
OLDER(pthread_once);
OLDER(pthread_sigmask);
#undef OLDER
