//! Why a request failed. The invariant: a failure that this version does not know is classified by its status, and
//! never taken for a success.

use wire::{Code, Failure};

/// Why a request failed for good. The services' own codes have a variant each; `docs/requests.md` says what they mean.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A business rule refused the command; the failure has its code, message and details. So does a code that this
    /// version does not know, with a status below 500.
    #[error("{0}")]
    Rejected(Failure),
    #[error("{0}")]
    Malformed(Failure),
    #[error("{0}")]
    NotFound(Failure),
    /// The view has not reached the position by the deadline.
    #[error("{0}")]
    ViewBehind(Failure),
    #[error("{0}")]
    CommandIdReused(Failure),
    #[error("{0}")]
    TooLarge(Failure),
    #[error("{0}")]
    Overloaded(Failure),
    #[error("{0}")]
    Unavailable(Failure),
    #[error("{0}")]
    Internal(Failure),
    /// The command may have happened, or may still happen. Send the same command with this key as `Nats-Msg-Id` to find
    /// out.
    #[error("it is not known whether the command {key} has happened: {last}")]
    OutcomeUnknown {
        key: String,
        /// The error of the last attempt.
        last: Box<Error>,
    },
    /// No service listens on the subject.
    #[error("no responders: nobody serves {0}")]
    NoResponders(String),
    #[error("no reply to {0} has come in time")]
    TimedOut(String),
    #[error("the connection to NATS was lost before the reply came")]
    ConnectionLost,
    /// The NATS user may not send to this subject.
    #[error("the NATS user has no permission to send to {0}")]
    Forbidden(String),
    /// The request was not sent, since its subject, body or a header is not valid.
    #[error("the request cannot be sent: {0}")]
    Unsendable(String),
    /// A reply that is neither a failure nor what the request promises.
    #[error("the reply cannot be read: {0}")]
    Unreadable(String),
}

impl Error {
    /// What the service said, if the request was answered.
    pub fn failure(&self) -> Option<&Failure> {
        match self {
            Self::Rejected(failure)
            | Self::Malformed(failure)
            | Self::NotFound(failure)
            | Self::ViewBehind(failure)
            | Self::CommandIdReused(failure)
            | Self::TooLarge(failure)
            | Self::Overloaded(failure)
            | Self::Unavailable(failure)
            | Self::Internal(failure) => Some(failure),
            Self::OutcomeUnknown { last, .. } => last.failure(),
            Self::NoResponders(_)
            | Self::TimedOut(_)
            | Self::ConnectionLost
            | Self::Forbidden(_)
            | Self::Unsendable(_)
            | Self::Unreadable(_) => None,
        }
    }

    /// The code of the failure.
    pub fn code(&self) -> Option<&str> {
        self.failure().map(|failure| &*failure.code)
    }

    /// Whether the same request may succeed a little later.
    pub(crate) fn is_passing(&self) -> bool {
        match self {
            Self::ViewBehind(_)
            | Self::Overloaded(_)
            | Self::Unavailable(_)
            | Self::NoResponders(_)
            | Self::TimedOut(_)
            | Self::ConnectionLost => true,
            Self::Rejected(_)
            | Self::Malformed(_)
            | Self::NotFound(_)
            | Self::CommandIdReused(_)
            | Self::TooLarge(_)
            | Self::Internal(_)
            | Self::OutcomeUnknown { .. }
            | Self::Forbidden(_)
            | Self::Unsendable(_)
            | Self::Unreadable(_) => false,
        }
    }

    /// Whether the attempt may have executed a command all the same.
    pub(crate) fn leaves_doubt(&self) -> bool {
        matches!(self, Self::Unavailable(failure) if failure.details.contains_key("outcome"))
            || matches!(self, Self::TimedOut(_) | Self::ConnectionLost | Self::Unreadable(_))
    }

    /// Whether the error settles what became of earlier attempts with the same key, too: each of them was, or will be,
    /// refused in the same way.
    pub(crate) fn settles(&self) -> bool {
        matches!(
            self,
            Self::Rejected(_) | Self::Malformed(_) | Self::NotFound(_) | Self::CommandIdReused(_) | Self::TooLarge(_)
        )
    }
}

impl From<Failure> for Error {
    fn from(failure: Failure) -> Self {
        match (Code::parse(&failure.code), failure.status) {
            (Some(Code::Malformed), _) => Self::Malformed(failure),
            (Some(Code::NotFound), _) => Self::NotFound(failure),
            (Some(Code::ViewBehind), _) => Self::ViewBehind(failure),
            (Some(Code::CommandIdReused), _) => Self::CommandIdReused(failure),
            (Some(Code::TooLarge), _) => Self::TooLarge(failure),
            (Some(Code::Overloaded), _) => Self::Overloaded(failure),
            (Some(Code::Unavailable), _) | (None, 503) => Self::Unavailable(failure),
            (Some(Code::Internal), _) | (None, 500..) => Self::Internal(failure),
            (Some(Code::Conflict) | None, _) => Self::Rejected(failure),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(code: &'static str, status: u16) -> Error {
        Error::from(Failure { code: code.into(), status, ..Failure::new(Code::Internal, "text") })
    }

    #[test]
    fn each_code_of_the_services_has_its_variant() {
        assert!(matches!(error("malformed", 400), Error::Malformed(_)));
        assert!(matches!(error("not_found", 404), Error::NotFound(_)));
        assert!(matches!(error("view_behind", 408), Error::ViewBehind(_)));
        assert!(matches!(error("command_id_reused", 409), Error::CommandIdReused(_)));
        assert!(matches!(error("too_large", 413), Error::TooLarge(_)));
        assert!(matches!(error("overloaded", 503), Error::Overloaded(_)));
        assert!(matches!(error("unavailable", 503), Error::Unavailable(_)));
        assert!(matches!(error("internal", 500), Error::Internal(_)));
    }

    #[test]
    fn the_codes_of_the_business_rules_are_rejections() {
        for (_, code, _) in domain::rejections() {
            assert!(matches!(error(code, 422), Error::Rejected(_)), "{code}");
        }
    }

    #[test]
    fn an_unknown_code_is_classified_by_its_status() {
        assert!(matches!(error("new_rule", 409), Error::Rejected(_)));
        assert!(matches!(error("frozen", 503), Error::Unavailable(_)));
        assert!(matches!(error("melted", 507), Error::Internal(_)));
        assert_eq!(error("new_rule", 409).code(), Some("new_rule"));
    }

    #[test]
    fn only_passing_failures_are_retried_and_only_lost_replies_leave_doubt() {
        for (error, is_passing, leaves_doubt) in [
            (error("out_of_stock", 422), false, false),
            (error("internal", 500), false, false),
            (error("overloaded", 503), true, false),
            (error("unavailable", 503), true, false),
            (error("view_behind", 408), true, false),
            (Error::NoResponders("cmd.user.register".into()), true, false),
            (Error::TimedOut("cmd.user.register".into()), true, true),
            (Error::ConnectionLost, true, true),
            (Error::Unreadable("no JSON".into()), false, true),
        ] {
            assert_eq!((error.is_passing(), error.leaves_doubt()), (is_passing, leaves_doubt), "{error}");
            assert!(!(error.settles() && (is_passing || leaves_doubt)), "{error}");
        }
        let unknown = Failure::new(Code::Unavailable, "PostgreSQL does not answer").with("outcome", "unknown");
        assert!(Error::from(unknown).leaves_doubt());
    }
}
