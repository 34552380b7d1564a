/* Functions of threads that moved from libpthread into libc with new versions (glibc 2.32 and 2.34), asked for in the
 * versions that every glibc has. .ci/wheels includes this before each source, so that a wheel serves systems older than
 * the one that it is built on. What a source does not use leaves no trace. */
#define OLDER(name) __asm__(".symver " #name "," #name "@GLIBC_2.2.5")
OLDER(pthread_create);
OLDER(pthread_detach);
OLDER(pthread_getspecific);
OLDER(pthread_join);
OLDER(pthread_key_create);
OLDER(pthread_key_delete);
OLDER(pthread_kill);
OLDER(pthread_mutex_trylock);
OLDER(pthread_mutexattr_destroy);
OLDER(pthread_mutexattr_init);
OLDER(pthread_mutexattr_settype);
OLDER(pthread_once);
OLDER(pthread_setspecific);
OLDER(pthread_sigmask);
#undef OLDER
