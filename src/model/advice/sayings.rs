//! What well-known servers say when they refuse, and what their customers can do about it.
//! Guarantee: a saying gives advice only; what becomes of a job is decided in `policy` alone.

use super::{EnhancedCode, Phase, Reply, ServerFacts};

/// One way of refusing, by which it is recognised, and what to do.
struct Saying {
    /// Part of the reply's text, in lower case; any of them. None: the code alone tells.
    words: &'static [&'static str],
    /// RFC 3463 code that tells as much as the words do.
    enhanced: Option<EnhancedCode>,
    /// The provider's domain; then the words or the code mean this at this provider only.
    domain: Option<&'static str>,
    advice: &'static str,
}

const fn says(words: &'static [&'static str], advice: &'static str) -> Saying {
    Saying { words, enhanced: None, domain: None, advice }
}

const fn at(domain: &'static str, advice: &'static str) -> Saying {
    Saying { words: &[], enhanced: None, domain: Some(domain), advice }
}

impl Saying {
    /// The code tells as much as the words do.
    const fn or_code(self, class: u8, subject: u16, detail: u16) -> Self {
        Self { enhanced: Some(EnhancedCode(class, subject, detail)), ..self }
    }

    fn fits(&self, reply: &Reply, server: ServerFacts<'_>) -> bool {
        reply.says(self.words)
            || (self.enhanced.is_some() && self.enhanced == reply.enhanced)
            || self.domain.is_some_and(|domain| server.is_in(domain))
    }
}

/// The advice for a refusal; none where its words are nobody's in particular.
pub(super) fn advice(phase: Phase, reply: &Reply, server: ServerFacts<'_>) -> Option<String> {
    let is_login = phase == Phase::Auth || matches!(reply.code, 530 | 534 | 535);
    let tables: &[&[Saying]] = match reply.code {
        _ if asks_for_tls(reply) => return Some(super::of_missing_tls(server)),
        400..=499 if phase == Phase::Auth => return Some(LOGIN_FOR_NOW.to_owned()),
        400..=499 if phase == Phase::Starttls && reply.code != 421 => return Some(TLS_FOR_NOW.to_owned()),
        500..=599 if is_login => &[LOGIN, LOGIN_BY_HOST],
        500..=599 if phase == Phase::Starttls => return Some(super::of_missing_tls(server)),
        400..=599 => &[DELIVERY],
        _ => return None,
    };
    let found = tables.iter().copied().flatten().find(|saying| saying.fits(reply, server));
    let turned_away = (phase == Phase::Greeting && reply.code >= 500).then_some(TURNED_AWAY);
    found.map(|saying| saying.advice).or(turned_away).map(ToOwned::to_owned)
}

fn asks_for_tls(reply: &Reply) -> bool {
    reply.code == 538 || (reply.code == 530 && reply.says(&["starttls", "tls first", "encryption"]))
}

const MICROSOFT_NO_PASSWORDS: &str = "Microsoft 365 takes no password for this account: basic authentication \
                                      is switched off there. Its administrator has to allow authenticated \
                                      SMTP for this mailbox, which security defaults and authentication \
                                      policies forbid; where that is not possible, use another server.";
const MICROSOFT_PASSWORD: &str = "Microsoft 365 refused the user name or the password. The user name is the \
                                  mailbox's whole address. With two-step verification an app password is \
                                  needed, and the administrator must have enabled authenticated SMTP for the \
                                  mailbox.";

/// Refused logins, by what is said. The first one that fits counts.
const LOGIN: &[Saying] = &[
    says(
        &["application-specific password"],
        "This account has two-step verification, so its own password is not taken here. Create an app password in the \
         Google account (Security, App passwords) and enter it as the password.",
    ),
    says(
        &["log in via your web browser", "web login required"],
        "The provider holds this login back. Sign in to the account in a web browser, confirm there that it was you, and \
         enter an app password here.",
    )
    .or_code(5, 7, 14),
    says(
        &["username and password not accepted"],
        "Google refused the user name or the password. The user name is the whole email address. The password has to be \
         an app password, which an account with two-step verification can create under Security.",
    ),
    says(
        &["smtpclientauthentication is disabled for the tenant"],
        "Authenticated SMTP is switched off for the whole Microsoft 365 organization. Its administrator has to switch it \
         on, for the organization in the Exchange admin center (Settings, Mail flow) or for this mailbox alone \
         (Manage email apps, Authenticated SMTP).",
    ),
    says(
        &["smtpclientauthentication is disabled for the mailbox"],
        "Authenticated SMTP is switched off for this mailbox. Its Microsoft 365 administrator has to switch it on: the \
         user's Mail settings, Manage email apps, Authenticated SMTP.",
    ),
    says(&["basic authentication is disabled"], MICROSOFT_NO_PASSWORDS),
    says(&["basic authentication is not supported"], MICROSOFT_NO_PASSWORDS).or_code(5, 7, 30),
    says(&["user credentials were incorrect"], MICROSOFT_PASSWORD),
    says(
        &["security defaults policy", "did not meet the criteria to be authenticated"],
        "A policy of the Microsoft 365 organization forbids this login. Its administrator has to exempt this mailbox \
         from it (security defaults, conditional access), or use another server.",
    ),
    says(&[], MICROSOFT_NO_PASSWORDS).or_code(5, 7, 139),
    says(
        &["authentication credentials invalid"],
        "Amazon SES refused the user name or the password. It wants SMTP credentials, created in the SES console (SMTP \
         settings): AWS access keys do not work here, and SMTP credentials belong to one region, that of the host.",
    ),
    says(
        &[
            "too many bad auth attempts",
            "too many failed login",
            "too many login attempts",
            "too many failures",
        ],
        "The provider has locked the login after too many wrong passwords. Wait some hours, then enter the right one; \
         many providers want an app password.",
    ),
    says(
        &[
            "account is locked",
            "account locked",
            "account disabled",
            "account is disabled",
            "account suspended",
        ],
        "The provider has locked this account. Sign in to it on the provider's web site to see why, or ask its \
         administrator.",
    ),
    says(
        &["not authenticated"],
        "The server wants a login that it recognises before it takes mail. Use the port for sending, 587, and have its \
         administrator allow authenticated SMTP for this account.",
    )
    .or_code(5, 7, 57),
    says(&[".outlook.com"], MICROSOFT_PASSWORD),
];

const APP_PASSWORD_YAHOO: &str = "This provider takes no account password here. Sign in to the account in a \
                                  web browser, create an app password under Account security, and enter it \
                                  as the password.";

/// Refused logins in words that many servers use, by whose server it is.
const LOGIN_BY_HOST: &[Saying] = &[
    at("office365.com", MICROSOFT_PASSWORD),
    at("outlook.com", MICROSOFT_PASSWORD),
    at(
        "gmail.com",
        "Google refused this login. Sign in to the account in a web browser and look for a security notice; the password \
         here has to be an app password.",
    ),
    at("yahoo.com", APP_PASSWORD_YAHOO),
    at("aol.com", APP_PASSWORD_YAHOO),
    at(
        "mail.me.com",
        "iCloud takes an app-specific password only: create one in the Apple account, under Sign-In and Security, and \
         enter it as the password. The user name is the whole iCloud address.",
    ),
    says(
        &["authentication unsuccessful"],
        "The Exchange server refused the user name or the password. Try the user name as the mailbox's address, or as \
         DOMAIN\\user; the administrator must have allowed basic authentication behind TLS on this port.",
    ),
    says(
        &[
            "error: authentication failed",
            "authentication failed",
            "invalid login",
            "incorrect authentication data",
        ],
        "The server refused the user name or the password. Enter both as in the mail program that works with this \
         account: the user name often is the whole email address. With two-step verification an app password is needed.",
    ),
];

/// The server cannot tell now whether the login is right.
const LOGIN_FOR_NOW: &str = "The server cannot check logins at the moment, so it is open whether the \
                             password is right. Try again later; nothing needs to be changed.";

/// The server offers STARTTLS and cannot do it now (RFC 3207 section 4: 454).
const TLS_FOR_NOW: &str = "The server offers STARTTLS and cannot take it up at the moment. Try again later; if it \
                           stays, its administrator has to look at its TLS settings and certificate.";

/// No service before anything was said (RFC 5321 section 3.1: 554).
const TURNED_AWAY: &str = "The server turns this connection away before any login. Check the port (587 or 465 is for \
                           sending), or ask the server's administrator to let this installation in.";

const SEND_AS: &str = "This account may not send as the from address. Use the account's own address as from \
                       address, or have the administrator give the account the right to send as it (Exchange \
                       and Microsoft 365: Send As).";

/// Refused senders and messages, by what is said. The first one that fits counts.
const DELIVERY: &[Saying] = &[
    says(&["sendasdenied"], SEND_AS).or_code(5, 2, 252),
    says(&["send as this sender"], SEND_AS).or_code(5, 7, 60),
    says(
        &["address is not verified", "address not verified"],
        "Amazon SES does not know the from address in this region. Verify the address or its domain in the SES console, \
         in the region of the host. While the account is in the sandbox, recipients have to be verified too.",
    ),
    says(
        &["ses:sendrawemail", "ses:sendemail"],
        "The SES credentials may not send mail: give their IAM user the permission ses:SendRawEmail.",
    ),
    says(
        &["not owned by user", "not owned by"],
        "The server lets this login send from its own addresses only. Use one of them as from address, or have the \
         server's administrator add this one to the login.",
    ),
    says(
        &["helo command rejected"],
        "The server does not accept the name that this installation greets with. Its operator has to set \
         smtp.hello_name to a full host name that the DNS knows.",
    ),
    says(
        &["relay access denied", "relaying denied", "relay denied", "unable to relay", "relay not permitted"],
        "The server takes no mail to other domains from this login. Use the provider's server for sending (submission, \
         port 587 or 465), and have its administrator allow the account to send to the outside.",
    ),
    says(
        &["sender address rejected: domain not found", "domain of sender address"],
        "The server finds no DNS record of the from address's domain. Check its spelling; the domain needs an MX record \
         or an address.",
    ),
    says(
        &["spf ", "spf:", "dkim", "dmarc", "unauthenticated email"],
        "The server does not believe that the mail comes from the from address's domain. Check the domain's SPF, DKIM \
         and DMARC records: they have to cover this server.",
    ),
    says(
        &["spamhaus", "blocked using", "blocklist", "blacklist", "block list"],
        "The server refuses the address that this installation sends from. Ask the server's administrator to let it in, \
         and tell the operator of this installation.",
    ),
];
